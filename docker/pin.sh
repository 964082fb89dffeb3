#!/bin/sh
# Write the digest of each base image behind its tag, as the registry shows it now. A tag can be
# moved to other content; a digest cannot. Without a registry nothing is changed.
#   docker/pin.sh [FOLDER]
set -eu
folder=${1:-$(dirname "$0")}
set -- "$folder"/*.Dockerfile "$folder/compose.yaml"
# Images of our own are built here and have no digest before.
images=$(sed -nE 's/^(FROM|    image:) ([a-z0-9./-]+:[^ @$]+).*/\2/p' "$@" | sort -u)

pins=
for image in $images; do
  digest=$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$image") || digest=
  case $digest in
    sha256:????????????????????????????????????????????????????????????????) ;;
    *) echo "no digest of $image: the registry cannot be asked; nothing was changed" >&2; exit 1 ;;
  esac
  pins="$pins $image@$digest"
done

for pin in $pins; do
  for file; do
    sed -E -e "s#((FROM|    image:) )${pin%@*}(@sha256:[0-9a-f]{64})?( |\$)#\1$pin\4#" "$file" >"$file.new"
    cat "$file.new" >"$file"
    rm "$file.new"
  done
  echo "$pin"
done
