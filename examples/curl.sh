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
echo

echo "Would a device that runs 0.0.1 get one? 200 is yes; 304 is no, and X-OTA-Reason says why."
ask --head "$SERVER/$PROJECT/latest.bin?version=0.0.1"

echo "Download the newest, unless it is here, going on where an earlier try broke off, and check it."
# By its own name, which the line with the digest has: "latest" may be another file in a minute.
line=$(ask "$SERVER/$PROJECT/latest.bin.sha256")
file=${line#*  }
if ! echo "$line" | sha256sum --status -c - 2>/dev/null; then
  ask --continue-at - --output "$file" "$SERVER/$PROJECT/$file"
fi
echo "$line" | sha256sum -c -

# The newest with wget:
#   wget --header "Authorization: Bearer $TOKEN" --output-document firmware.bin \
#     http://192.168.1.5:8000/firmware/latest.bin
