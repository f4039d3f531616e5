// Keeps an ESP32 up to date from ota-server with the library esp32FOTA.
//
// Libraries: esp32FOTA, ArduinoJson. The partition scheme needs two app partitions ("with OTA").
// To publish: raise FIRMWARE_VERSION, export the compiled binary, and copy it to the firmware
// folder of the server as <project>-<version>.bin, with the very version that stands here. Take the
// file that ends in .ino.bin. A file system beside it, <project>-<version>.littlefs.bin, is
// installed first; over HTTPS the library does that on port 443 or 4433 only.

#include <WiFi.h>
#include <esp32FOTA.hpp>

#define FIRMWARE_VERSION "1.0.0"

const char OTA_URL[] = "http://192.168.1.5:8000/sensor/esp32fota.json";  // the server, your project
const char OTA_TYPE[] = "sensor";  // the project again: the manifest repeats it as "type"
const char OTA_TOKEN[] = "";       // when the server wants one
const uint32_t CHECK_EVERY = 60UL * 60UL * 1000UL;  // milliseconds

const char WIFI_NAME[] = "my-network";
const char WIFI_PASSWORD[] = "my-password";

esp32FOTA fota(OTA_TYPE, FIRMWARE_VERSION, false);

// With https:// what `openssl x509 -in ota.pem` prints on the server; never the private key.
// CryptoMemAsset certificate("certificate", "-----BEGIN CERTIFICATE-----\n...", 1234);

void setup() {
  Serial.begin(115200);
  WiFi.begin(WIFI_NAME, WIFI_PASSWORD);
  fota.setManifestURL(OTA_URL);
  fota.setCertFileSystem(nullptr);  // nothing of ours lies in the file system, so it may be updated
  // fota.setRootCA(&certificate);
  if (OTA_TOKEN[0]) {
    fota.setExtraHTTPHeader("Authorization", String("Bearer ") + OTA_TOKEN);
  }
}

void loop() {
  static bool asked = false;
  static uint32_t askedAt = 0;
  if (WiFi.status() == WL_CONNECTED && (!asked || millis() - askedAt >= CHECK_EVERY)) {
    asked = true;
    askedAt = millis();
    Serial.printf("running %s, asking %s\n", FIRMWARE_VERSION, OTA_URL);
    if (fota.execHTTPcheck()) {
      fota.execOTA();  // restarts when it succeeds
    }
  }
  // What the device is for goes here. Keep it short, or an update has to wait for it.
}
