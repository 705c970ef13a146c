#!/usr/bin/env bash
# Makes the secrets of compose.yaml, once: random, out of reach of the host's other users, never printed.
set -euo pipefail
folder="$(cd "$(dirname "$0")/.." && pwd)/secrets"
mkdir -p "$folder"
chmod 700 "$folder" # nobody else on this host gets in; a container is given its files one by one, and its user must be able to read them
random() { head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n'; }
make() { # name: a random secret, unless it is there
    [ -s "$folder/$1" ] || random > "$folder/$1"
    chmod 644 "$folder/$1"
}
for name in ray_token s3_access_key s3_secret_key postgres_password grafana_password; do make "$name"; done
printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' \
    "$(cat "$folder/s3_access_key")" "$(cat "$folder/s3_secret_key")" > "$folder/s3_credentials"
chmod 644 "$folder/s3_credentials"
echo "secrets are in $folder"
