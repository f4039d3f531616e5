// Lets a person choose a firmware of ota-server in the menu of AutoConnect: "Update" lists what fits
// this chip, and installs what is picked, older versions too.
//
// Libraries: AutoConnect, ArduinoJson, PageBuilder. Plain HTTP, and no token: the library knows
// neither TLS nor passwords. To publish: copy the compiled binary to the firmware folder of the
// server as <project>-<version>.bin.

#if defined(ARDUINO_ARCH_ESP8266)
#include <ESP8266WiFi.h>
#else
#include <WiFi.h>
#endif
#include <AutoConnect.h>

const char OTA_HOST[] = "192.168.1.5";  // the address of the server, without http://
const uint16_t OTA_PORT = 8000;

AutoConnect portal;
AutoConnectUpdate update(OTA_HOST, OTA_PORT);

void setup() {
  Serial.begin(115200);
  if (portal.begin()) {
    update.attach(portal);
  }
}

void loop() {
  portal.handleClient();
  // What the device is for goes here.
}
