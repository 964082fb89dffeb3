# An S3 store on one host, as a user without rights. Build it in this folder:
#   docker build -f storage.Dockerfile -t dar-storage:0.1.0 .
FROM chrislusf/seaweedfs:4.48
USER 0:0
RUN mkdir -p /data \
    && chown 10001:10001 /data
USER 10001:10001
VOLUME /data
EXPOSE 8333
ENTRYPOINT ["weed"]
# One process for all parts; it makes the bucket at its first start.
CMD ["mini", "-dir=/data", "-ip=storage", "-ip.bind=0.0.0.0", "-bucket=dar", \
     "-s3.config=/run/secrets/s3_identities", "-s3.port=8333", "-s3.autoCreateBucket=false", \
     "-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false", \
     "-master.telemetry=false"]
