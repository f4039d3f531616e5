/* Load for an update server, on loopback, from one core: one process, one epoll loop.
 *
 *     load mode=MODE port=PORT head=FILE [name=value...]
 *
 * prints one line of JSON. bench/load.py compiles it (with -DTLS if OpenSSL's headers are there),
 * starts it and reads the line. The modes:
 *
 *     new    `connections` at a time, a new connection for each request, one closes: the next opens
 *     keep   `connections` that stay, each with `depth` requests under way
 *     open   a new connection for each request, `rate` a second, whatever the server does; latency
 *            counts from the moment the request was due, so a server that stalls cannot hide it
 *     bulk   as new, but the bodies count; plain ones are dropped in the kernel, not copied
 *     slow   `connections` readers of `low` to `high` bytes a second, as a device's TCP receives:
 *            MSS 1460, window 5,744; each byte is compared with the file
 *
 * new, open and bulk stop opening after `seconds` (or `count` requests) and then wait until all
 * that was begun has ended, so that a server's CPU time belongs to exactly `done` requests.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>
#ifdef TLS
#include <openssl/ssl.h>
#endif

#define MAX_REQUEST 1024 /* bytes of a request's head */
#define MAX_REPLY 2048   /* bytes of a reply's head */
#define MAX_DEPTH 64     /* requests under way on one connection */
#define SLOTS 20         /* a slow reader reads in one of 20 ticks */
#define TICK 0.005       /* seconds */
#define MIN_READ 512     /* bytes; a slow reader waits until so many are due */

enum state { IDLE, CONNECTING, SHAKING, WRITING, READING, CLOSING };

struct connection {
    int fd;
    enum state state;
    double begun;           /* monotonic seconds; open: when it was due */
    double due[MAX_DEPTH];  /* keep: begin of each request under way */
    unsigned first, under_way;
    size_t unsent, from;    /* of the requests being written */
    char *out;
    char head[MAX_REPLY];
    size_t head_size;
    int status;
    int64_t length, body;   /* promised, received; length -1: the head is not complete */
    double rate, last_byte; /* slow */
#ifdef TLS
    SSL *ssl;
    SSL_SESSION *session;
#endif
};

static struct {
    const char *mode, *path_head, *path_file, *resume;
    int port, connections, depth, expect, tls, version;
    long count;
    double seconds, rate, low, high, timeout, ramp;
} set = {"new", "", "", "none", 0, 16, 1, 304, 0, 13, 0, 0.5, 1000, 10e3, 50e3, 10, 2};

static struct {
    long done, opened, reset, refused, timed_out, wrong, reused, shaken;
    int64_t bytes;
    double longest_stall;
    int most; /* connections open at once */
} sum;

#define FLEET 10000 /* devices that ask: bench.fleet knows as many */

static char request[MAX_REQUEST];
static size_t request_size;
static char *macs[4];
static int mac_count;
static const char *image;
static int64_t image_size;
static float *latencies;
static size_t latency_room;
static struct connection *all;
static struct connection **idle;
static int idle_count, open_count, poller;
static double began, ends;
static char sink[1 << 20];
#ifdef TLS
static SSL_CTX *context;
#endif

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(2);
}

/* -- Settings ------------------------------------------------------------------------------- */

static void read_setting(const char *name, const char *value) {
    struct { const char *name; int *number; double *real; const char **text; } known[] = {
        {"mode", 0, 0, &set.mode}, {"head", 0, 0, &set.path_head}, {"file", 0, 0, &set.path_file},
        {"resume", 0, 0, &set.resume}, {"port", &set.port, 0, 0},
        {"connections", &set.connections, 0, 0}, {"depth", &set.depth, 0, 0},
        {"expect", &set.expect, 0, 0}, {"tls", &set.tls, 0, 0}, {"version", &set.version, 0, 0},
        {"seconds", 0, &set.seconds, 0}, {"rate", 0, &set.rate, 0}, {"low", 0, &set.low, 0},
        {"high", 0, &set.high, 0}, {"timeout", 0, &set.timeout, 0}, {"ramp", 0, &set.ramp, 0},
    };
    if (!strcmp(name, "count")) {
        set.count = atol(value);
        return;
    }
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(name, known[i].name)) {
            if (known[i].number) *known[i].number = atoi(value);
            if (known[i].real) *known[i].real = atof(value);
            if (known[i].text) *known[i].text = value;
            return;
        }
    die("unknown setting %s", name);
}

static void read_request(void) {
    FILE *file = fopen(set.path_head, "rb");
    if (!file) die("%s: %s", set.path_head, strerror(errno));
    request_size = fread(request, 1, sizeof request - 1, file);
    fclose(file);
    for (char *at = request; (at = strstr(at, ":CF:7F:")) && mac_count < 4; at++)
        macs[mac_count++] = at + 7;
}

static void read_image(void) {
    struct stat status;
    int fd = open(set.path_file, O_RDONLY);
    if (fd < 0 || fstat(fd, &status)) die("%s: %s", set.path_file, strerror(errno));
    image_size = status.st_size;
    image = mmap(0, (size_t)image_size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
    close(fd);
}

/* -- One connection --------------------------------------------------------------------------- */

static void write_requests(struct connection *c, int number) {
    static const char digits[] = "0123456789ABCDEF";
    static unsigned device;
    for (int i = 0; i < number; i++) {
        device = device % FLEET + 1;
        for (int m = 0; m < mac_count; m++)
            for (int d = 0; d < 6; d++)
                macs[m][d / 2 * 3 + d % 2] = digits[device >> (20 - 4 * d) & 15];
        memcpy(c->out + i * request_size, request, request_size);
    }
    c->from = 0;
    c->unsent = number * request_size;
}

static void note_latency(double seconds) {
    if ((size_t)sum.done >= latency_room) {
        latency_room = latency_room ? latency_room * 2 : 1 << 16;
        latencies = realloc(latencies, latency_room * sizeof *latencies);
        if (!latencies) die("no memory");
    }
    latencies[sum.done++] = (float)seconds;
}

static void end(struct connection *c) {
#ifdef TLS
    if (c->ssl) {
        SSL_SESSION *session = SSL_get1_session(c->ssl);
        if (*set.resume != 'n' && session && SSL_SESSION_is_resumable(session)) {
            SSL_SESSION_free(c->session);
            c->session = session;
        } else
            SSL_SESSION_free(session);
        /* As devices do: no close_notify. Without this OpenSSL would not resume the session. */
        SSL_set_shutdown(c->ssl, SSL_SENT_SHUTDOWN | SSL_RECEIVED_SHUTDOWN);
        SSL_free(c->ssl);
        c->ssl = 0;
    }
#endif
    close(c->fd);
    c->fd = -1;
    c->state = IDLE;
    open_count--;
    idle[idle_count++] = c;
}

static void fail(struct connection *c, long *counter) {
    ++*counter;
    end(c);
}

static void begin(struct connection *c, double due) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(set.port)};
    int one = 1, window = 5744, segment = 1460;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0) die("socket: %s", strerror(errno));
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (*set.mode == 's') {
        setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &window, sizeof window);
        setsockopt(c->fd, IPPROTO_TCP, TCP_MAXSEG, &segment, sizeof segment);
    }
    c->state = CONNECTING;
    c->begun = c->last_byte = due;
    c->first = c->under_way = 0;
    c->head_size = 0;
    c->length = -1;
    c->body = 0;
    sum.opened += set.depth;
    if (++open_count > sum.most) sum.most = open_count;
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) {
        fail(c, &sum.refused);
        return;
    }
#ifdef TLS
    if (set.tls) {
        c->ssl = SSL_new(context);
        SSL_set_fd(c->ssl, c->fd);
        SSL_set_connect_state(c->ssl);
        if (c->session) SSL_set_session(c->ssl, c->session);
    }
#endif
    write_requests(c, set.depth);
    for (int i = 0; i < set.depth; i++) c->due[i] = due;
    c->under_way = set.depth;
    if (*set.mode != 's') {
        struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = c};
        epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event);
    }
}

/* Bytes moved; 0: the other side has closed; -1: later; -2: broken. */
static ssize_t outcome(ssize_t result) {
    if (result >= 0) return result;
    return errno == EAGAIN || errno == ENOTCONN || errno == EINPROGRESS ? -1 : -2;
}

#ifdef TLS
static ssize_t tls_outcome(struct connection *c, int result) {
    int error = SSL_get_error(c->ssl, result);
    if (result > 0) return result;
    if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE) return -1;
    return error == SSL_ERROR_ZERO_RETURN ? 0 : -2;
}
#endif

static ssize_t receive(struct connection *c, char *to, size_t size, int drop) {
#ifdef TLS
    if (c->ssl) return tls_outcome(c, SSL_read(c->ssl, to, (int)size));
#endif
    return outcome(recv(c->fd, to, size, drop ? MSG_TRUNC : 0));
}

static ssize_t give(struct connection *c, const char *from, size_t size) {
#ifdef TLS
    if (c->ssl) return tls_outcome(c, SSL_write(c->ssl, from, (int)size));
#endif
    return outcome(send(c->fd, from, size, MSG_NOSIGNAL));
}

/* Connects, shakes hands and writes as far as it goes; 0: the connection has failed and ended. */
static int advance_write(struct connection *c) {
    if (c->state == CONNECTING) {
        int error = 0;
        socklen_t size = sizeof error;
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        if (error) return fail(c, error == ECONNREFUSED ? &sum.refused : &sum.reset), 0;
        c->state = set.tls ? SHAKING : WRITING;
    }
#ifdef TLS
    if (c->state == SHAKING) {
        ssize_t result = tls_outcome(c, SSL_do_handshake(c->ssl));
        if (result == -1) return 1;
        if (result != 1) return fail(c, &sum.reset), 0;
        sum.shaken++;
        sum.reused += SSL_session_reused(c->ssl);
        c->state = WRITING;
    }
#endif
    while (c->unsent) {
        ssize_t result = give(c, c->out + c->from, c->unsent);
        if (result == -1) return 1;
        if (result <= 0) return fail(c, &sum.reset), 0;
        c->from += result;
        c->unsent -= result;
        if (!c->unsent) c->state = READING;
    }
    return 1;
}

/* Takes what belongs to the head out of `data`; gives back how many bytes. 0: it is no reply. */
static size_t take_head(struct connection *c, const char *data, size_t size) {
    size_t before = c->head_size, room = sizeof c->head - 1 - before;
    if (size > room) size = room;
    memcpy(c->head + before, data, size);
    c->head[before + size] = 0;
    c->head_size += size;
    char *blank = strstr(c->head, "\r\n\r\n");
    if (!blank) return room ? size : 0;
    blank[2] = 0;
    c->status = atoi(c->head + 9);
    char *field = strcasestr(c->head, "\r\ncontent-length:");
    c->length = c->status == 304 || !field ? 0 : atoll(field + 17);
    c->body = 0;
    return blank + 4 - c->head - before;
}

/* One whole reply is here. 0: the connection has ended. */
static int reply_is_whole(struct connection *c) {
    double at = now();
    if (c->status != set.expect || (image && c->length != image_size))
        return fail(c, &sum.wrong), 0;
    note_latency(at - c->due[c->first]);
    c->first = (c->first + 1) % set.depth;
    c->under_way--;
    c->head_size = 0;
    c->length = -1;
    if (*set.mode != 'k') {
        c->state = CLOSING;
        return 1;
    }
    if (c->under_way) return 1;
    int stop = set.count ? sum.opened + set.depth > set.count : at >= ends;
    if (stop) return end(c), 0;
    sum.opened += set.depth;
    write_requests(c, set.depth);
    c->first = 0;
    c->under_way = set.depth;
    for (int i = 0; i < set.depth; i++) c->due[i] = at;
    c->state = WRITING;
    return advance_write(c);
}

/* Reads until nothing is left; bytes behind the head count, those of slow readers are compared. */
static void advance_read(struct connection *c, size_t limit) {
    while (limit) {
        int in_body = c->length > 0 && c->body < c->length;
        size_t size = limit < sizeof sink ? limit : sizeof sink;
        ssize_t result = receive(c, sink, size, in_body && *set.mode == 'b' && !set.tls);
        if (result == -1) return;
        if (result <= 0) {
            if (c->state == CLOSING) end(c);
            else fail(c, &sum.reset);
            return;
        }
        limit -= result;
        const char *data = sink;
        size_t left = result;
        while (left) {
            if (c->length < 0) {
                size_t taken = take_head(c, data, left);
                if (!taken) return fail(c, &sum.wrong);
                data += taken;
                left -= taken;
                if (c->length < 0) continue;
            }
            size_t part = c->length - c->body < (int64_t)left ? c->length - c->body : left;
            if (*set.mode == 's' && c->length == image_size && memcmp(data, image + c->body, part))
                return fail(c, &sum.wrong);
            data += part;
            left -= part;
            c->body += part;
            sum.bytes += part;
            if (c->body == c->length && !reply_is_whole(c)) return;
            if (c->state == CLOSING && left) return fail(c, &sum.wrong);
        }
    }
}

/* -- The loops -------------------------------------------------------------------------------- */

static void drop_late(double at) {
    double most = set.timeout + (*set.mode == 'k' ? set.seconds : 0);
    for (int i = 0; i < set.connections; i++)
        if (all[i].state != IDLE && at - all[i].begun > most)
            fail(&all[i], &sum.timed_out);
}

static void open_due(double at, int timer) {
    int is_open = *set.mode == 'o';
    double due = is_open ? began : at;
    while (idle_count && !(set.count ? sum.opened >= set.count : due >= ends)) {
        if (is_open) {
            due = began + sum.opened / set.rate;
            if (due >= ends) return;
            if (due > at) {
                struct itimerspec when = {.it_value.tv_nsec = (long)((due - at) * 1e9) + 1};
                timerfd_settime(timer, 0, &when, 0);
                return;
            }
        }
        struct connection *c = idle[--idle_count];
        begin(c, due);
        if (c->state != IDLE) advance_write(c);
    }
}

static void run(void) {
    struct epoll_event events[256];
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.ptr = 0};
    double swept = began;
    poller = epoll_create1(0);
    epoll_ctl(poller, EPOLL_CTL_ADD, timer, &event);
    for (;;) {
        double at = now();
        if (*set.mode != 'k' || sum.opened < set.connections * set.depth) open_due(at, timer);
        int over = *set.mode == 'k' || (set.count ? sum.opened >= set.count
                 : *set.mode == 'o' ? began + sum.opened / set.rate >= ends : at >= ends);
        if (!open_count && over) return;
        int number = epoll_wait(poller, events, 256, 100);
        for (int i = 0; i < number; i++) {
            struct connection *c = events[i].data.ptr;
            if (!c || c->state == IDLE) continue;
            if (c->state < READING && !advance_write(c)) continue;
            if (c->state >= READING) advance_read(c, SIZE_MAX);
        }
        if (at - swept > 0.25) drop_late(swept = at);
    }
}

static void slow_step(struct connection *c, double at) {
    if (c->state < READING && !advance_write(c)) return;
    if (c->state < READING) return;
    int64_t had = c->body + (int64_t)c->head_size;
    double due = c->rate * (at - c->begun) - had;
    if (due < MIN_READ) return;
    advance_read(c, (size_t)due);
    if (c->state == CLOSING) end(c); /* a device that has it all does not wait for the other side */
    if (c->state == IDLE) return;
    if (c->body + (int64_t)c->head_size > had) {
        if (at - c->last_byte > sum.longest_stall) sum.longest_stall = at - c->last_byte;
        c->last_byte = at;
    } else if (at - c->last_byte > set.timeout)
        fail(c, &sum.timed_out);
}

static void run_slow(void) {
    double at = now();
    for (long tick = 0; sum.opened < set.connections || open_count; tick++) {
        for (int i = (int)(tick % SLOTS); i < set.connections; i += SLOTS) {
            struct connection *c = &all[i];
            at = now();
            if (c->state != IDLE) slow_step(c, at);
            else if (c->rate == 0 && at >= began + set.ramp * i / set.connections) {
                c->rate = set.low + (set.high - set.low) * (i * 7919L % 1000) / 1000;
                begin(c, at);
            }
        }
        double rest = began + (tick + 1) * TICK - now();
        if (rest > 0) usleep((useconds_t)(rest * 1e6));
        else if (rest < -1) began -= rest; /* cannot keep up; the CPU share in the report says so */
    }
}

/* -- Report ----------------------------------------------------------------------------------- */

static int by_size(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static double percentile(double share) {
    if (!sum.done) return 0;
    size_t at = (size_t)(share * (double)sum.done);
    return latencies[at >= (size_t)sum.done ? (size_t)sum.done - 1 : at];
}

static void report(double started) {
    struct rusage usage;
    double elapsed = now() - started;
    getrusage(RUSAGE_SELF, &usage);
    double cpu = usage.ru_utime.tv_sec + usage.ru_stime.tv_sec
               + (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
    qsort(latencies, (size_t)sum.done, sizeof *latencies, by_size);
    printf("{\"done\": %ld, \"seconds\": %.6f, \"bytes\": %lld, \"cpu\": %.6f, \"most\": %d, "
           "\"refused\": %ld, \"reset\": %ld, \"timed_out\": %ld, \"wrong\": %ld, "
           "\"shaken\": %ld, \"reused\": %ld, \"stall\": %.6f, "
           "\"p50\": %.6f, \"p99\": %.6f, \"p999\": %.6f, \"worst\": %.6f}\n",
           sum.done, elapsed, (long long)sum.bytes, cpu, sum.most,
           sum.refused, sum.reset, sum.timed_out, sum.wrong, sum.shaken, sum.reused,
           sum.longest_stall, percentile(0.5), percentile(0.99), percentile(0.999),
           percentile(1));
}

#ifdef TLS
static void make_context(void) {
    context = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_verify(context, SSL_VERIFY_NONE, 0);
    int version = set.version == 12 ? TLS1_2_VERSION : TLS1_3_VERSION;
    SSL_CTX_set_min_proto_version(context, version);
    SSL_CTX_set_max_proto_version(context, version);
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF); /* each connection keeps its own */
    if (!strcmp(set.resume, "id")) SSL_CTX_set_options(context, SSL_OP_NO_TICKET);
}
#endif

int main(int count, char **arguments) {
    for (int i = 1; i < count; i++) {
        char *equals = strchr(arguments[i], '=');
        if (!equals) die("%s: not name=value", arguments[i]);
        *equals = 0;
        read_setting(arguments[i], equals + 1);
    }
    signal(SIGPIPE, SIG_IGN);
    if (set.depth < 1 || set.depth > MAX_DEPTH) die("depth is 1 to %d", MAX_DEPTH);
    read_request();
    if (*set.path_file) read_image();
    all = calloc(set.connections, sizeof *all);
    idle = calloc(set.connections, sizeof *idle);
    if (!all || !idle) die("no memory");
    for (int i = 0; i < set.connections; i++) {
        all[i].out = malloc(set.depth * request_size);
        if (!all[i].out) die("no memory");
        if (*set.mode != 's') idle[idle_count++] = &all[i];
    }
#ifdef TLS
    if (set.tls) make_context();
#else
    if (set.tls) die("compiled without TLS");
#endif
    double started = began = now();
    ends = began + set.seconds;
    if (*set.mode == 's') run_slow();
    else run();
    report(started);
    return 0;
}
