#!/bin/sh
# Install ota_server.py as the systemd service "ota-server", or upgrade it: running it again is safe.
set -eu
umask 022

NAME=ota-server
DESTDIR=${DESTDIR:-}
PYTHON=${PYTHON:-/usr/bin/python3}
HERE=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
PROGRAM=/opt/$NAME
UNITS=/etc/systemd/system
UNIT=$UNITS/$NAME.service
SOCKET=$UNITS/$NAME.socket
SETTINGS=/etc/default/$NAME
FIRMWARE=/srv/firmware
STATE=/var/lib/$NAME

usage() {
    cat <<END
Usage: sudo ./install.sh [--uninstall | --purge | --help]

Without an option: install or upgrade $NAME and start it as a systemd service.
  program   $PROGRAM/ota_server.py, and $PROGRAM/ota_fleet/ if it is beside this script
  service   $UNIT
  socket    $SOCKET  (not enabled)
  settings  $SETTINGS  (never overwritten)
  firmware  $FIRMWARE  (never touched once it exists)
  fleet     $STATE  (if OTA_STATE says so; never touched)

  --uninstall  remove program, service and the user $NAME; keep firmware, settings and the fleet
  --purge      remove these too, and say what
  --help       show this text

Environment:
  PYTHON   the interpreter of the service, 3.11 or newer (now $PYTHON)
  DESTDIR  install below this folder, for packages: no user is made, no service started
END
}

say() { printf '%s\n' "$*"; }
die() { printf 'install.sh: %s\n' "$*" >&2; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }
systemd_runs() { [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; }

need_root() {
    [ -n "$DESTDIR" ] || [ "$(id -u)" -eq 0 ] || die "must run as root; try: sudo ./install.sh"
}

need_python() {
    found=$(command -v "$PYTHON") || die "no python3 at $PYTHON; \
install Python 3.11 or newer, or name it: PYTHON=/path/to/python3 ./install.sh"
    PYTHON=$found
    version=$("$PYTHON" -I -c 'import sys
print(*sys.version_info[:3], sep=".")
sys.exit(sys.version_info < (3, 11))') || die "needs Python 3.11 or newer, but $PYTHON is \
${version:-not a Python}; name a newer one: PYTHON=/path/to/python3 ./install.sh"
}

# put FILE MODE: standard input becomes FILE in one step, so that nobody ever sees half of it.
put() {
    mkdir -p "$DESTDIR${1%/*}"
    cat >"$DESTDIR$1.new"
    chmod "$2" "$DESTDIR$1.new"
    mv -f "$DESTDIR$1.new" "$DESTDIR$1"
}

make_user() {
    if id -u "$NAME" >/dev/null 2>&1; then return; fi
    if has useradd; then
        useradd --system --user-group --no-create-home --home-dir /nonexistent \
            --shell /usr/sbin/nologin "$NAME"
    else
        # busybox
        addgroup -S "$NAME"
        adduser -S -D -H -h /nonexistent -s /sbin/nologin -G "$NAME" "$NAME"
    fi
}

# A folder with the set-group-id bit and the group root is what --uninstall leaves.
take_back_firmware() {
    if [ -n "$DESTDIR" ]; then return; fi
    if [ -n "$(find "$FIRMWARE" -prune -group root -perm -2000)" ]; then
        find "$FIRMWARE" -group root -exec chgrp -h "$NAME" {} +
    fi
}

# Whoever called sudo owns the folder and copies files without sudo; the set-group-id bit hands each new
# file to the service's group, so that it is readable even when others have no access.
make_firmware_folder() {
    if [ -d "$DESTDIR$FIRMWARE" ]; then
        take_back_firmware
        return
    fi
    mkdir -p "$DESTDIR$FIRMWARE"
    if [ -z "$DESTDIR" ]; then chown "${SUDO_USER:-root}:$NAME" "$FIRMWARE"; fi
    chmod 2755 "$DESTDIR$FIRMWARE"
}

# ota_fleet/ holds what the operator's commands need; the server alone runs without it.
install_fleet() {
    remove_fleet
    for source in "$HERE"/ota_fleet/*.py "$HERE"/ota_fleet/static/*.css "$HERE"/ota_fleet/static/*.js; do
        if [ -f "$source" ]; then put "$PROGRAM${source#"$HERE"}" 0644 <"$source"; fi
    done
}

remove_fleet() {
    rm -rf "$DESTDIR$PROGRAM/ota_fleet/__pycache__" "$DESTDIR$PROGRAM/ota_fleet/static"
    rm -f "$DESTDIR$PROGRAM"/ota_fleet/*.py
    rmdir "$DESTDIR$PROGRAM/ota_fleet" 2>/dev/null || :
}

default_settings() {
    cat <<END
# Settings of $NAME. Remove a leading # to change one, then: sudo systemctl restart $NAME
# A value ends with its line: write no comment behind it.
# Only root reads this file (0640 root), so tokens may stand here.

# The folder with the firmware, NAME-MAJOR.MINOR.PATCH.bin
#OTA_DIR=$FIRMWARE

# The address and port to listen on; 127.0.0.1 is right behind a proxy on this machine, and so is
# unix:/run/$NAME/ota.sock. Neither counts where $NAME.socket is enabled.
#OTA_HOST=127.0.0.1
#OTA_PORT=8000

# debug, info, warning or error
#OTA_LOG=info

# HTTPS: certificate and key (PEM, one file may hold both); the user $NAME must be able to read them.
#OTA_CERT=/etc/ssl/private/ota.pem
#OTA_KEY=/etc/ssl/private/ota.key

# Connections at the same time; images on their way at the same time; KB/s of each
#OTA_MAX_CONNECTIONS=10000
#OTA_MAX_DOWNLOADS=20
#OTA_RATE=500

# Who may ask: one token for all, or a file with a token for each project; only from these networks.
# The user $NAME must be able to read the files: chown root:$NAME, chmod 0640.
#OTA_TOKEN=a-long-secret
#OTA_TOKEN_FILE=/etc/$NAME/tokens.json
#OTA_SIGN_KEY_FILE=/etc/$NAME/sign.key
#OTA_ALLOW=192.168.0.0/16,fd00::/8

# The page with all releases: on or off. Web pages of which origin may read manifests and images.
#OTA_LISTING=on
#OTA_CORS=*

# Behind a proxy: whose X-Forwarded-... is believed; who sends the images instead.
#OTA_TRUST_PROXY=127.0.0.1,::1
#OTA_ACCEL=nginx:/_fw/

# Remember devices and take uploads, in this folder; the first account (or by the link in the log).
#OTA_STATE=$STATE
#ADMIN_EMAIL=you@example.org
#ADMIN_PASSWORD=choose-a-long-one
# Who gets images, open or whitelist; MB of an upload; uploads of a project to keep, 0 is all; devices to know.
#OTA_ADMIT=open
#OTA_MAX_IMAGE=16
#OTA_KEEP=0
#OTA_MAX_DEVICES=10000
# What the server is called from outside, in links it sends; a broker of MQTT, which needs paho-mqtt.
#OTA_PUBLIC_URL=https://ota.example.org
#OTA_MQTT=mqtts://user:password@broker.example.org/ota
END
}

# setting OTA_X DEFAULT: what the settings file says.
setting() {
    value=$(sed -n "s/^$1=//p" "$DESTDIR$SETTINGS" | tail -n 1 | tr -d "\"'")
    printf '%s' "${value:-$2}"
}

start_service() {
    systemctl daemon-reload
    systemctl --quiet enable "$NAME"
    # Earlier failures must not make systemd refuse this start.
    systemctl reset-failed "$NAME.service" "$NAME.socket" 2>/dev/null || :
    if systemctl restart "$NAME"; then return; fi
    if has journalctl; then journalctl -u "$NAME" -n 10 --no-pager -o cat >&2; fi
    die "the service does not start, see above; settings are in $SETTINGS"
}

# server_url HOST PORT: what to type on another machine.
server_url() {
    host=$1
    case $host in
        '' | 0.0.0.0 | ::) host=$(hostname -I 2>/dev/null | cut -d ' ' -f 1) || host='' ;;
    esac
    case $host in *:*) host="[$host]" ;; esac
    scheme=http
    # The certificate may be one that systemd hands over: see LoadCredential= in the unit.
    cert=$(systemctl show -P Environment "$NAME" | sed -n '/OTA_CERT=/p')$(setting OTA_CERT '')
    if [ -n "$cert" ]; then scheme=https; fi
    printf '%s' "$scheme://${host:-$(uname -n)}:$2"
}

tell() {
    host=$(setting OTA_HOST '')
    port=$(setting OTA_PORT 8000)
    if systemctl --quiet is-active "$NAME.socket"; then
        host=''
        port=$(systemctl show -P Listen "$NAME.socket" | sed 's/ .*//; s/.*://; q')
    fi
    case $host$port in
        unix:* | /*) say "Server:   listens on ${host:-$port}, for a proxy on this machine" ;;
        *)
            url=$(server_url "$host" "$port")
            say "Server:   $url/NAME  (is it well? $url/healthz)"
            if [ -d "$PROGRAM/ota_fleet" ]; then
                say "Check:    $PYTHON $PROGRAM/ota_server.py check $url/NAME"
            fi
            ;;
    esac
    folder=$(setting OTA_DIR "$FIRMWARE")
    say "Firmware: copy NAME-MAJOR.MINOR.PATCH.bin to $folder, for example $folder/sensor-1.0.0.bin"
    say "Settings: $SETTINGS"
    say "Log:      sudo journalctl -u $NAME -f"
}

install_all() {
    need_root
    need_python
    for source in ota_server.py "$NAME.service" "$NAME.socket"; do
        [ -f "$HERE/$source" ] || die "$source is not beside install.sh"
    done
    if [ -z "$DESTDIR" ]; then make_user; fi
    put "$PROGRAM/ota_server.py" 0644 <"$HERE/ota_server.py"
    install_fleet
    put "$SOCKET" 0644 <"$HERE/$NAME.socket"
    sed "s|/usr/bin/python3 |$PYTHON |" "$HERE/$NAME.service" | put "$UNIT" 0644
    # Only root reads the settings, systemd is root: secrets may stand there.
    if [ ! -e "$DESTDIR$SETTINGS" ]; then default_settings | put "$SETTINGS" 0640; fi
    make_firmware_folder
    if [ -n "$DESTDIR" ]; then
        say "$NAME is installed below $DESTDIR."
    elif systemd_runs; then
        start_service
        say "$NAME is installed and running."
        tell
    else
        say "$NAME is installed, but systemd does not run here: nothing was started."
        say "By hand: OTA_DIR=$FIRMWARE $PYTHON -I $PROGRAM/ota_server.py"
    fi
}

remove_user() {
    # Kept firmware must not fall to the next group that gets this number.
    find "$FIRMWARE" -group "$NAME" -exec chgrp -h root {} + 2>/dev/null || :
    if id -u "$NAME" >/dev/null 2>&1; then
        if has userdel; then userdel "$NAME"; else deluser "$NAME"; fi
    fi
    if grep -q "^$NAME:" /etc/group; then
        if has groupdel; then groupdel "$NAME"; else delgroup "$NAME"; fi
    fi
}

remove_all() {
    need_root
    if systemd_runs; then
        for unit in "$NAME.socket" "$NAME.service"; do
            systemctl --quiet disable --now "$unit" 2>/dev/null || :
        done
    fi
    rm -f "$DESTDIR$UNIT" "$DESTDIR$SOCKET" "$DESTDIR$PROGRAM/ota_server.py"
    remove_fleet
    rmdir "$DESTDIR$PROGRAM" 2>/dev/null || :
    if systemd_runs; then
        systemctl daemon-reload
        systemctl reset-failed "$NAME.service" "$NAME.socket" 2>/dev/null || :
    fi
    if [ -z "$DESTDIR" ]; then remove_user; fi
    say "$NAME is removed."
}

uninstall_all() {
    remove_all
    say "Kept: firmware in $DESTDIR$FIRMWARE and settings in $DESTDIR$SETTINGS."
    rmdir "$DESTDIR$STATE" 2>/dev/null || :
    if [ ! -e "$DESTDIR$STATE" ]; then return; fi
    # The next user that gets this number must not read it; systemd gives it back at the next start.
    if [ -z "$DESTDIR" ]; then chown -R root:root "$STATE"; fi
    say "Kept: what was remembered in $DESTDIR$STATE."
}

# erase WHAT PATH: removes it, if it is there, and says so.
erase() {
    if [ ! -e "$DESTDIR$2" ] && [ ! -L "$DESTDIR$2" ]; then return; fi
    if rm -rf "$DESTDIR$2"; then say "Removed: $1 $DESTDIR$2"; else say "Still there: $DESTDIR$2"; fi
}

purge_all() {
    folder=$FIRMWARE
    if [ -r "$DESTDIR$SETTINGS" ]; then folder=$(setting OTA_DIR "$FIRMWARE"); fi
    remove_all
    files=$(find "$DESTDIR$FIRMWARE" -type f 2>/dev/null | wc -l)
    erase "$((files)) files of firmware in" "$FIRMWARE"
    erase "settings in" "$SETTINGS"
    erase "what was remembered in" "$STATE"
    erase "changes to the service in" "$UNIT.d"
    erase "changes to the socket in" "$SOCKET.d"
    if [ "$folder" != "$FIRMWARE" ] && [ -e "$DESTDIR$folder" ]; then
        say "Kept: $folder, which OTA_DIR named."
    fi
}

if [ $# -gt 1 ]; then usage >&2; exit 2; fi
case ${1:-} in
    '') install_all ;;
    --uninstall) uninstall_all ;;
    --purge) purge_all ;;
    --help | -h) usage ;;
    *) say "install.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
esac
