#!/bin/sh
# Make the keys and secrets of an installation, each in a file of its own; files that exist stay.
#   docker/secrets.sh [FOLDER]
# The folder is closed to other users of this host. Its files are not: a container sees a file of
# its own alone, and reads it as a user that this host does not know.
set -eu
folder=${1:-$(dirname "$0")/secrets}
umask 077
mkdir -p "$folder"
chmod 700 "$folder"

random() { head -c 32 /dev/urandom | base64 | tr -d '\n'; }
plain() { random | tr '+/' '-_' | tr -d '='; }
keep() { # NAME VALUE
  [ -e "$folder/$1" ] || printf '%s\n' "$2" >"$folder/$1.new"
  [ -e "$folder/$1" ] || { chmod 444 "$folder/$1.new" && mv "$folder/$1.new" "$folder/$1"; }
}

keep postgres_password "$(plain)"
keep database_url "postgresql+psycopg://dar:$(cat "$folder/postgres_password")@postgres:5432/dar"
keep valkey_password "requirepass $(plain)"
keep broker_url "redis://:$(sed 's/requirepass //' "$folder/valkey_password")@valkey:6379/0"
keep s3_access_key_id "dar-$(plain)"
keep s3_secret_access_key "$(plain)"
# The key of the service opens its bucket alone.
keep s3_identities '{"identities": [{"name": "dar", "actions": ["Read:dar", "Write:dar", "List:dar", "Tagging:dar"],
  "credentials": [{"accessKey": "'"$(cat "$folder/s3_access_key_id")"'", "secretKey": "'"$(cat "$folder/s3_secret_access_key")"'"}]}]}'
keep api_key "dar-sk-$(plain)"
keep worker_key "dar-wk-$(plain)"
keep reward_secret "whsec_$(random)"
keep secret_keys "$(random | tr '+/' '-_')"
keep hf_token ""
echo "the secrets are in $folder; the key of users is in api_key"
