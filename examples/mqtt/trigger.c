// Updates a device with ESP-IDF 5 when ota-server says so by MQTT, and tells it what it runs.
//
//   ESP_ERROR_CHECK(example_connect());       Wi-Fi first, as in examples/esp-idf/main.c
//   trigger_start("mqtts://broker.example:8883", "5ccf7f123456", "PASSWORD");
//
// The server's topics: command=/switch/cmd/{mac}&state=/switch/state/{mac}. CMakeLists.txt:
//   REQUIRES mqtt json esp_https_ota app_update

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cJSON.h"
#include "esp_app_desc.h"
#include "esp_http_client.h"
#include "esp_https_ota.h"
#include "esp_log.h"
#include "esp_system.h"
#include "freertos/FreeRTOS.h"
#include "freertos/task.h"
#include "mqtt_client.h"

extern const char ca_pem[];  // who signed the certificates of the broker and of the server

static const char *const TAG = "trigger";
static char command_topic[64], state_topic[64];
static volatile bool is_updating;  // one at a time

static void say(esp_mqtt_client_handle_t client, const char *state) {
  char text[160];
  snprintf(text, sizeof(text), "{\"version\":\"%s\",\"project\":\"%s\",\"state\":\"%s\"}",
           esp_app_get_description()->version, esp_app_get_description()->project_name, state);
  // Not retained: what the server finds retained may be old, and counts for nothing there.
  esp_mqtt_client_publish(client, state_topic, text, 0, 1, 0);
}

static void update(void *argument) {
  char *url = argument;
  const esp_http_client_config_t http = {
      .url = url, .cert_pem = ca_pem, .timeout_ms = 10000, .keep_alive_enable = true};
  const esp_https_ota_config_t ota = {.http_config = &http};
  const esp_err_t result = esp_https_ota(&ota);
  free(url);
  if (result == ESP_OK) {
    esp_restart();
  }
  ESP_LOGW(TAG, "no update: %s", esp_err_to_name(result));  // also 304: there is nothing new
  is_updating = false;
  vTaskDelete(NULL);
}

static void on_command(esp_mqtt_client_handle_t client, const char *data, int size) {
  cJSON *message = cJSON_ParseWithLength(data, size);
  const char *type = cJSON_GetStringValue(cJSON_GetObjectItem(message, "type"));
  const char *url = cJSON_GetStringValue(cJSON_GetObjectItem(message, "url"));
  if (type != NULL && url != NULL && strcmp(type, "ota_trigger") == 0 && !is_updating) {
    is_updating = true;
    say(client, "downloading");  // so that this version, now, is not taken for a failure
    // In a task of its own: here it would keep the broker from being answered.
    if (xTaskCreate(update, "update", 8192, strdup(url), 5, NULL) != pdPASS) {
      is_updating = false;
    }
  }
  cJSON_Delete(message);
}

static void on_event(void *argument, esp_event_base_t base, int32_t id, void *data) {
  const esp_mqtt_event_handle_t event = data;
  if (id == MQTT_EVENT_CONNECTED) {
    esp_mqtt_client_subscribe(event->client, command_topic, 1);
    say(event->client, "idle");  // after an update: the proof that it worked
  } else if (id == MQTT_EVENT_DATA && event->data_len == event->total_data_len) {
    on_command(event->client, event->data, event->data_len);
  }
}

void trigger_start(const char *broker, const char *mac, const char *password) {
  snprintf(command_topic, sizeof(command_topic), "/switch/cmd/%s", mac);
  snprintf(state_topic, sizeof(state_topic), "/switch/state/%s", mac);
  const esp_mqtt_client_config_t config = {
      .broker.address.uri = broker,
      .broker.verification.certificate = ca_pem,
      .credentials.username = mac,
      .credentials.client_id = mac,
      .credentials.authentication.password = password,
      .session.disable_clean_session = true,  // a trigger waits at the broker for who sleeps
      .buffer.size = 2048,                    // of one message: a signed URL is long
  };
  esp_mqtt_client_handle_t client = esp_mqtt_client_init(&config);
  esp_mqtt_client_register_event(client, MQTT_EVENT_ANY, on_event, NULL);
  esp_mqtt_client_start(client);
}
