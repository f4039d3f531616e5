# docker build -t ota-server . && docker run -p 8000:8000 -v /my-firmware-directory:/firmware ota-server
# Options may follow the image's name. Running downloads get up to 30 s: docker stop --time 40.
FROM python:3.13-slim

LABEL org.opencontainers.image.title="ota-server" \
      org.opencontainers.image.description="Over-the-air firmware updates for ESP8266 and ESP32" \
      org.opencontainers.image.licenses="MIT"

COPY ota_server.py /app/
# A checkout with a strict umask must stay readable for the user below, and writable for root alone.
RUN chmod 0644 /app/ota_server.py && mkdir -p /firmware

# By number, so that --user and orchestrators that forbid root can check it. A mounted folder must be
# readable for this user, or run with: --user "$(id -u):$(id -g)"
USER 10001:10001

ENV OTA_DIR=/firmware
VOLUME ["/firmware"]
EXPOSE 8000
STOPSIGNAL SIGTERM

# The certificate is for the outside name, not for 127.0.0.1: not verified here.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python3", "-I", "-c", "import os, ssl, http.client as c; e = os.environ; tls = {'context': ssl._create_unverified_context()} if e.get('OTA_CERT') else {}; h = (c.HTTPSConnection if tls else c.HTTPConnection)('127.0.0.1', int(e.get('OTA_PORT') or 8000), timeout=4, **tls); h.request('GET', '/healthz'); raise SystemExit(h.getresponse().status != 200)"]

ENTRYPOINT ["python3", "-I", "/app/ota_server.py"]
