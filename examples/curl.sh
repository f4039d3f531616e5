#!/bin/sh
# What a person or a script asks ota-server. Set SERVER, PROJECT and, if it wants one, TOKEN:
#
#   SERVER=http://192.168.1.5:8000 PROJECT=firmware sh curl.sh
set -eu

SERVER=${SERVER:-http://192.168.1.5:8000}
PROJECT=${PROJECT:-firmware}
TOKEN=${TOKEN:-}

ask() {
  if [ -n "$TOKEN" ]; then
    set -- --header "Authorization: Bearer $TOKEN" "$@"
  fi
  curl --silent --show-error --fail "$@"
}

echo "Which versions are there?"
ask "$SERVER/$PROJECT/versions"

echo "Would a device that runs 0.0.1 get one? 200 is yes; 304 is no, and X-OTA-Reason says why."
ask --head "$SERVER/$PROJECT/latest.bin?version=0.0.1"

echo "Download the newest, going on where an earlier try broke off, and check it."
ask --continue-at - --output "$PROJECT.bin" "$SERVER/$PROJECT/latest.bin"
digest=$(ask "$SERVER/$PROJECT/latest.bin.sha256" | cut -d ' ' -f 1)
echo "$digest  $PROJECT.bin" | sha256sum -c -

# The same with wget:
#   wget --header "Authorization: Bearer $TOKEN" --continue --output-document firmware.bin \
#     http://192.168.1.5:8000/firmware/latest.bin
