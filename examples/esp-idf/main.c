// Keeps a device with ESP-IDF up to date from ota-server: asks after each start.
//
// To publish: raise PROJECT_VER in CMakeLists.txt (or version.txt), build, and copy
// build/<name>.bin to the firmware folder of the server as <project>-<version>.bin, with the very
// version that stands there. The partition table needs two app partitions ("Two OTA definitions").
//
// It wants the component protocol_examples_common of ESP-IDF's examples, or your own Wi-Fi code.
// sdkconfig.defaults:
//   CONFIG_PARTITION_TABLE_TWO_OTA=y
//   CONFIG_BOOTLOADER_APP_ROLLBACK_ENABLE=y          the boot loader goes back when an image fails
//   CONFIG_ESP_HTTPS_OTA_ENABLE_PARTIAL_DOWNLOAD=y   in pieces, for lines that break
//   CONFIG_ESP_HTTPS_OTA_ALLOW_HTTP=y                only for http://

#include <stdio.h>

#include "esp_app_desc.h"
#include "esp_event.h"
#include "esp_http_client.h"
#include "esp_https_ota.h"
#include "esp_log.h"
#include "esp_netif.h"
#include "esp_ota_ops.h"
#include "esp_system.h"
#include "nvs_flash.h"
#include "protocol_examples_common.h"  // example_connect(): Wi-Fi as menuconfig says

#define OTA_URL "http://192.168.1.5:8000/sensor/latest.bin"  // the server's address, your project
#define OTA_TOKEN ""                                         // when the server wants one

// With https://: what `openssl x509 -in ota.pem` prints on the server; never the private key.
static const char *const CERTIFICATE = NULL;

static const char *const TAG = "ota";

static esp_err_t add_headers(esp_http_client_handle_t client) {
  if (OTA_TOKEN[0] == '\0') {
    return ESP_OK;
  }
  return esp_http_client_set_header(client, "Authorization", "Bearer " OTA_TOKEN);
}

// Whether there is something newer. A download in pieces takes 304, "nothing new", for an error,
// so this is asked first.
static bool is_newer_there(const esp_http_client_config_t *config) {
  esp_http_client_handle_t client = esp_http_client_init(config);
  if (client == NULL) {
    return false;
  }
  int status = 0;
  esp_http_client_set_method(client, HTTP_METHOD_HEAD);
  if (add_headers(client) == ESP_OK && esp_http_client_perform(client) == ESP_OK) {
    status = esp_http_client_get_status_code(client);
  }
  esp_http_client_cleanup(client);
  ESP_LOGI(TAG, "the server says %d", status);
  return status == 200;
}

static void check_for_update(void) {
  char url[256];  // with the method it must fit into 512 bytes
  snprintf(url, sizeof(url), "%s?version=%s", OTA_URL, esp_app_get_description()->version);
  ESP_LOGI(TAG, "asking %s", url);

  const esp_http_client_config_t http = {
      .url = url,
      .cert_pem = CERTIFICATE,
      .timeout_ms = 10000,
      .keep_alive_enable = true,
  };
  const esp_https_ota_config_t ota = {
      .http_config = &http,
      .http_client_init_cb = add_headers,
      .partial_http_download = true,  // without it: one request for the whole image
      .max_http_request_size = 64 * 1024,
  };
  if (!is_newer_there(&http)) {
    return;
  }
  // A release that appears between two pieces gives an image that does not verify: the old one
  // stays, and the next check succeeds.
  const esp_err_t result = esp_https_ota(&ota);
  if (result == ESP_OK) {
    esp_restart();
  }
  ESP_LOGE(TAG, "update failed: %s", esp_err_to_name(result));
}

void app_main(void) {
  ESP_ERROR_CHECK(nvs_flash_init());
  ESP_ERROR_CHECK(esp_netif_init());
  ESP_ERROR_CHECK(esp_event_loop_create_default());
  ESP_ERROR_CHECK(example_connect());
  esp_ota_mark_app_valid_cancel_rollback();  // this one works: it found the network
  check_for_update();
  // What the device is for goes here.
}
