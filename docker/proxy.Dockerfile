# The proxy as a user without rights. Build it in this folder:
#   docker build -f proxy.Dockerfile -t dar-proxy:0.1.0 .
FROM caddy:2.11.4-alpine
# A copy has no file capability, which a container without capabilities could not run.
RUN cp /usr/bin/caddy /usr/local/bin/caddy \
    && mkdir -p /data \
    && chown 10001:10001 /data
ENV XDG_DATA_HOME=/data \
    XDG_CONFIG_HOME=/data
USER 10001:10001
VOLUME /data
EXPOSE 8080 8443 9443
CMD ["caddy", "run", "--config", "/etc/caddy/Caddyfile", "--adapter", "caddyfile"]
