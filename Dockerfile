# docker build -t ota-server . && docker run -p 8000:8000 -v /my-firmware-directory:/firmware ota-server
# Options may follow the image's name. Running downloads get up to 30 s: docker stop --time 40.
FROM python:3.13-slim

LABEL org.opencontainers.image.title="ota-server" \
      org.opencontainers.image.description="Over-the-air firmware updates for ESP8266 and ESP32" \
      org.opencontainers.image.licenses="MIT"

# For OTA_MQTT: docker build --build-arg WITH=paho-mqtt -t ota-server .
ARG WITH=""
# Whoever names a package may name its version, too.
# hadolint ignore=DL3013
RUN test -z "$WITH" || python3 -m pip install --no-cache-dir "$WITH"

COPY ota_server.py /app/
COPY ota_fleet /app/ota_fleet/
# A checkout with a strict umask must stay readable for the user below, and writable for root alone.
# /state is for OTA_STATE: a fresh named volume takes over that its owner may write there.
RUN chmod -R u=rwX,go=rX /app && mkdir -p /firmware /state && chown 10001:10001 /state && chmod 0700 /state

# By number, so that --user and orchestrators that forbid root can check it. A mounted folder must be
# readable for this user, or run with: --user "$(id -u):$(id -g)"
USER 10001:10001

ENV OTA_DIR=/firmware
VOLUME ["/firmware"]
EXPOSE 8000
# Ends the server as SIGTERM does. But Linux drops a signal that process 1 does not handle yet, and Python
# handles this one from its first moment on: a stop right after the start is not lost, even without --init.
STOPSIGNAL SIGINT

# It asks where OTA_HOST and OTA_PORT say, a unix socket too; /healthz needs no token and no allowed address.
# The certificate is for the outside name, not for 127.0.0.1: not verified here.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python3", "-I", "-c", "import os, socket, ssl, http.client as c; g = os.environ.get; h = g('OTA_HOST') or '127.0.0.1'; u = h.startswith('unix:'); s = socket.socket(socket.AF_UNIX) if u else socket.create_connection((h, int(g('OTA_PORT') or 8000)), 4); s.settimeout(4); u and s.connect(h[5:]); s = ssl._create_unverified_context().wrap_socket(s) if g('OTA_CERT') else s; k = c.HTTPConnection('ota'); k.sock = s; k.request('GET', '/healthz'); raise SystemExit(k.getresponse().status != 200)"]

ENTRYPOINT ["python3", "-I", "/app/ota_server.py"]
