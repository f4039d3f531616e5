// Keeps an ESP8266 up to date from ota-server: asks after each start and then once an hour.
//
// Board package: esp8266 3.x. Nothing else to install.
// To publish: raise FIRMWARE_VERSION, export the compiled binary, and copy it to the firmware
// folder of the server as <project>-<version>.bin, with the very version that stands here.

#include <ESP8266WiFi.h>
#include <ESP8266httpUpdate.h>
#include <WiFiClientSecure.h>
#include <time.h>

#ifndef FIRMWARE_VERSION  // a build flag may set it: -DFIRMWARE_VERSION='"1.0.0"'
#define FIRMWARE_VERSION "1.0.0"
#endif

const char WIFI_NAME[] = "my-network";
const char WIFI_PASSWORD[] = "my-password";

const char OTA_HOST[] = "192.168.1.5";
const uint16_t OTA_PORT = 8000;
const char OTA_PROJECT[] = "firmware";
const uint32_t CHECK_EVERY = 60UL * 60UL * 1000UL;  // milliseconds

// How the server is trusted. Keep one line; the others stay comments.
#define TRUST_NETWORK      // plain HTTP: for a network whose members you trust
// #define TRUST_CERTIFICATE  // HTTPS: the certificate below, name and dates are checked
// #define TRUST_FINGERPRINT "00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF:00:11:22:33"
// #define TRUST_ANYBODY      // HTTPS without a check: whoever answers may install firmware

#ifdef TRUST_CERTIFICATE
// What `openssl x509 -in ota.pem` prints on the server. The private key stays there.
const char CERTIFICATE[] PROGMEM = R"PEM(
-----BEGIN CERTIFICATE-----
paste it here
-----END CERTIFICATE-----
)PEM";
BearSSL::X509List trusted(CERTIFICATE);  // must live as long as any client that uses it
#endif

#ifdef TRUST_NETWORK
const char SCHEME[] = "http";
using Client = WiFiClient;

void prepare(Client &) {}
#else
const char SCHEME[] = "https";
using Client = BearSSL::WiFiClientSecure;

// The dates in a certificate mean nothing to a clock that stands at 1970.
void waitForClock() {
  configTime(0, 0, "pool.ntp.org");
  for (int tries = 0; time(nullptr) < 1700000000 && tries < 100; tries++) {
    delay(100);
  }
}

void prepare(Client &client) {
#if defined(TRUST_CERTIFICATE)
  waitForClock();
  client.setTrustAnchors(&trusted);
#elif defined(TRUST_FINGERPRINT)
  client.setFingerprint(TRUST_FINGERPRINT);
#else
  client.setInsecure();
#endif
  // Without this the receive buffer takes 16 KB of memory. Whoever answers must agree to short
  // records: ota-server does; a proxy in front of it may not, so ask before shrinking.
  if (BearSSL::WiFiClientSecure::probeMaxFragmentLength(OTA_HOST, OTA_PORT, 1024)) {
    client.setBufferSizes(1024, 512);
  }
}
#endif

void checkForUpdate() {
  Client client;
  prepare(client);
  String url = String(SCHEME) + "://" + OTA_HOST + ":" + OTA_PORT + "/" + OTA_PROJECT;
  Serial.printf("running %s, asking %s\n", FIRMWARE_VERSION, url.c_str());
  switch (ESPhttpUpdate.update(client, url, FIRMWARE_VERSION)) {
    case HTTP_UPDATE_FAILED:
      Serial.printf("update failed, error %d: %s\n", ESPhttpUpdate.getLastError(),
                    ESPhttpUpdate.getLastErrorString().c_str());
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
// `pio run -t buildfs` or the upload tool of the IDE makes it. The whole file system is replaced.
// Call it where checkForUpdate() is called, and keep the version of the files in the sketch, too.
/*
#include <LittleFS.h>
#define FILES_VERSION "1.0.0"

void checkForFiles() {
  Client client;
  prepare(client);
  String url = String(SCHEME) + "://" + OTA_HOST + ":" + OTA_PORT + "/" + OTA_PROJECT;
  LittleFS.end();
  ESPhttpUpdate.rebootOnUpdate(false);
  t_httpUpdate_return result = ESPhttpUpdate.updateFS(client, url, FILES_VERSION);
  ESPhttpUpdate.rebootOnUpdate(true);
  LittleFS.begin();
  Serial.printf("files: %d %s\n", result, ESPhttpUpdate.getLastErrorString().c_str());
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
