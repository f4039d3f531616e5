// Keeps an ESP32 (S2, S3, C3, C6...) up to date from ota-server: asks after each start and then
// once an hour.
//
// Board package: esp32 3.x. The partition scheme needs two app partitions ("with OTA").
// To publish: raise FIRMWARE_VERSION, export the compiled binary, and copy it to the firmware
// folder of the server as <project>-<version>.bin, with the very version that stands here. Take
// the file that ends in .ino.bin, not the one that ends in .merged.bin.

#include <HTTPUpdate.h>
#include <NetworkClientSecure.h>
#include <WiFi.h>

#ifndef FIRMWARE_VERSION  // a build flag may set it: -DFIRMWARE_VERSION='"1.0.0"'
#define FIRMWARE_VERSION "1.0.0"
#endif

const char WIFI_NAME[] = "my-network";
const char WIFI_PASSWORD[] = "my-password";

const char OTA_HOST[] = "192.168.1.5";
const uint16_t OTA_PORT = 8000;
const char OTA_PROJECT[] = "sensor-esp32";          // one project for each chip
const uint32_t CHECK_EVERY = 60UL * 60UL * 1000UL;  // milliseconds

// How the server is trusted. Keep one line; the others stay comments.
#define TRUST_NETWORK      // plain HTTP: for a network whose members you trust
// #define TRUST_CERTIFICATE  // HTTPS: the certificate below
// #define TRUST_ANYBODY      // HTTPS without a check: whoever answers may install firmware

#ifdef TRUST_CERTIFICATE
// What `openssl x509 -in ota.pem` prints on the server. The private key stays there.
const char CERTIFICATE[] = R"PEM(
-----BEGIN CERTIFICATE-----
paste it here
-----END CERTIFICATE-----
)PEM";
#endif

#ifdef TRUST_NETWORK
const char SCHEME[] = "http";
using Client = NetworkClient;

void prepare(Client &) {}
#else
const char SCHEME[] = "https";
using Client = NetworkClientSecure;

void prepare(Client &client) {
#ifdef TRUST_CERTIFICATE
  client.setCACert(CERTIFICATE);
#else
  client.setInsecure();
#endif
}
#endif

void checkForUpdate() {
  Client client;
  prepare(client);
  String url = String(SCHEME) + "://" + OTA_HOST + ":" + OTA_PORT + "/" + OTA_PROJECT;
  Serial.printf("running %s, asking %s\n", FIRMWARE_VERSION, url.c_str());
  switch (httpUpdate.update(client, url, FIRMWARE_VERSION)) {
    case HTTP_UPDATE_FAILED:
      Serial.printf("update failed, error %d: %s\n", httpUpdate.getLastError(),
                    httpUpdate.getLastErrorString().c_str());
      break;
    case HTTP_UPDATE_NO_UPDATES:
      Serial.println("no update");
      break;
    case HTTP_UPDATE_OK:  // not reached: the device restarts by itself; see rebootOnUpdate()
      Serial.println("updated");
      break;
  }
}

// The files of LittleFS, updated the same way: <project>-<version>.littlefs.bin on the server, as
// `pio run -t buildfs` or the upload tool of the IDE makes it. The whole file system is replaced;
// it lies in the partition "spiffs", whose name the function below has. Call it where
// checkForUpdate() is called, and keep the version of the files in the sketch, too.
/*
#include <LittleFS.h>
#define FILES_VERSION "1.0.0"

void checkForFiles() {
  Client client;
  prepare(client);
  String url = String(SCHEME) + "://" + OTA_HOST + ":" + OTA_PORT + "/" + OTA_PROJECT;
  LittleFS.end();
  t_httpUpdate_return result = httpUpdate.updateSpiffs(client, url, FILES_VERSION);
  LittleFS.begin();
  Serial.printf("files: %d %s\n", result, httpUpdate.getLastErrorString().c_str());
}
*/

void setup() {
  Serial.begin(115200);
  WiFi.mode(WIFI_STA);
  WiFi.begin(WIFI_NAME, WIFI_PASSWORD);
}

void loop() {
  static bool asked = false;
  static uint32_t askedAt = 0;
  if (WiFi.status() == WL_CONNECTED && (!asked || millis() - askedAt >= CHECK_EVERY)) {
    asked = true;
    askedAt = millis();
    checkForUpdate();
  }
  // What the device is for goes here. Keep it short, or an update has to wait for it.
}
