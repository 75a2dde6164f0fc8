/* The client that everybody is measured with: `load PORT PATH BODY-FILE [--name value]...`.

   One thread, one epoll. Sends the same POST again and again, and prints what came of it as one
   JSON object. `--connections N`: closed loop, each sends its next request when the answer to the
   last is whole. `--rate R`: R requests a second on a schedule whatever the answers do, on N
   connections at most; what finds none free waits, and its time counts from when it was due.
   `##########` in the body becomes the request's number, so that no two are alike. `--seconds`,
   `--requests`: when to stop sending, whichever comes first; answers still out are then
   waited for, `--drain` seconds at most. `--tail TEXT`: an answer that does not end with it (but for
   empty lines) is cut. `--ramp S`: closed loop whose connections open over so long a time. `--skip
   S`: times of requests that began so early are left out. `--header LINE`: one more in the head.
   `--events 1`: counts the empty lines that end events, and takes the times between reads of one
   answer. SIGINT: stops sending now. Invariant: every request sent is counted once, as completed (whatever
   its status), lost (its connection ended) or unfinished. */

#include "wire.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <signal.h>
#include <unistd.h>

#define MOST_CONNECTIONS 4096
#define MOST_SAMPLES 4000000
#define HEAD_BYTES 8192
#define TAIL_BYTES 32
#define RETRY_NS 20000000
#define NUMBER_BYTES 10

enum state { CLOSED, IDLE, HEAD, BODY };
struct conn {
    int fd;
    enum state state;
    char head[HEAD_BYTES];
    size_t head_length, sent;
    int status;
    bool close;
    int64_t left; /* -1: until the end of the connection; -2: chunked */
    struct chunks chunks;
    char tail[TAIL_BYTES];
    size_t tail_length;
    int64_t began_ns, opens_ns;
    uint32_t first_us;
    bool begun; /* some of the body has come */
    int64_t came_ns; /* the last of it */
    char before; /* the last byte of it */
};
static struct conn *conns;
static int idle[MOST_CONNECTIONS], idles;

static int port, connections = 64, poller;
static double rate;
static volatile sig_atomic_t stops;
static long most_requests = -1;
static int64_t length_ns = 5 * SECOND_NS, drain_ns = 15 * SECOND_NS, ramp_ns, skip_ns;
static const char *tail = "";
static bool by_events;
static char *request, *number; /* `number`: where each request has one of its own, or NULL */
static size_t request_length;

static int64_t started_ns, ends_ns;
static long sent, completed, samples, in_time, ok, cut, lost, reads, refusals, open_now, most_open;
static int64_t last_ns;
static uint32_t *took_us, *first_us, *gaps_us;
static long gaps, events;
static char complaint[160];

static void complain(int status, const char *text, size_t length) {
    if (complaint[0]) return;
    size_t at = (size_t)snprintf(complaint, sizeof complaint, "%d ", status);
    for (size_t n = 0; n < length && at + 1 < sizeof complaint; n++) {
        char one = text[n];
        complaint[at++] = one < 32 || one > 126 || one == '"' || one == '\\' ? '\'' : one;
    }
    complaint[at] = 0;
}

static void hang_up(struct conn *c) {
    if (c->state == HEAD || c->state == BODY) lost++;
    if (c->begun) open_now--;
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
    c->begun = false;
    c->state = CLOSED;
}

/* The kernel of a loopback connection answers at once, unless the server's queue is full. */
static bool dial(struct conn *c, int64_t now) {
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct timeval patience = {.tv_sec = 1};
    int on = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->fd < 0) die("socket");
    setsockopt(c->fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address)) {
        refusals++;
        complain(0, strerror(errno), strlen(strerror(errno)));
        hang_up(c);
        c->opens_ns = now + RETRY_NS;
        return false;
    }
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event);
    c->state = IDLE;
    return true;
}

static void send_on(struct conn *c, int64_t began_ns) {
    c->began_ns = began_ns;
    c->state = HEAD;
    c->head_length = c->tail_length = 0;
    c->begun = false;
    sent++;
    if (number) {
        char digits[NUMBER_BYTES + 1];
        snprintf(digits, sizeof digits, "%0*ld", NUMBER_BYTES, sent % 1000000000);
        memcpy(number, digits, NUMBER_BYTES);
    }
    /* The kernel takes a short one immediately; a long one is all that this process does meanwhile. */
    for (size_t done = 0; done < request_length;) {
        ssize_t taken = send(c->fd, request + done, request_length - done, MSG_NOSIGNAL);
        if (taken <= 0) {
            hang_up(c);
            return;
        }
        done += (size_t)taken;
    }
}

static bool may_send(int64_t now) {
    return now < ends_ns && (most_requests < 0 || sent < most_requests);
}

static void rest(struct conn *c, int64_t now) {
    if (c->close) hang_up(c);
    if (rate > 0) {
        if (c->state == IDLE) idle[idles++] = (int)(c - conns);
        return;
    }
    if (!may_send(now)) return;
    if (c->state == CLOSED && !dial(c, now)) return;
    send_on(c, now);
}

static void complete(struct conn *c) {
    int64_t now = now_ns();
    size_t length = c->tail_length, size = strlen(tail);
    while (length && (c->tail[length - 1] == '\n' || c->tail[length - 1] == '\r')) length--;
    if (samples < MOST_SAMPLES && c->began_ns >= started_ns + skip_ns) {
        took_us[samples] = (uint32_t)((now - c->began_ns) / 1000);
        first_us[samples++] = c->first_us;
    }
    if (c->begun) open_now--;
    completed++;
    if (now <= ends_ns) in_time++;
    if (c->status == 200 || c->status == 202) {
        ok++;
        if (length < size || memcmp(c->tail + length - size, tail, size)) cut++;
    }
    last_ns = now;
    c->begun = false;
    c->state = IDLE;
    rest(c, now);
}

static void content(void *of, const char *data, size_t length) {
    struct conn *c = of;
    if (!c->begun) {
        c->begun = true;
        c->before = 0;
        if (++open_now > most_open) most_open = open_now;
        c->first_us = (uint32_t)((c->came_ns - c->began_ns) / 1000);
        if (c->status != 200 && c->status != 202) complain(c->status, data, length);
    }
    for (size_t n = 0; n < length && by_events; n++) {
        if (data[n] == '\n' && c->before == '\n') events++;
        c->before = data[n];
    }
    if (length >= TAIL_BYTES) {
        memcpy(c->tail, data + length - TAIL_BYTES, TAIL_BYTES);
        c->tail_length = TAIL_BYTES;
        return;
    }
    size_t keep = c->tail_length + length > TAIL_BYTES ? TAIL_BYTES - length : c->tail_length;
    memmove(c->tail, c->tail + c->tail_length - keep, keep);
    memcpy(c->tail + keep, data, length);
    c->tail_length = keep + length;
}

static void take_body(struct conn *c, const char *data, size_t length) {
    int64_t now = now_ns();
    if (c->begun && by_events && gaps < MOST_SAMPLES)
        gaps_us[gaps++] = (uint32_t)((now - c->came_ns) / 1000);
    c->came_ns = now;
    if (c->left == -2) {
        size_t taken = decode(&c->chunks, data, length, content, c);
        if (c->chunks.state == BROKEN || (c->chunks.state == DONE && taken < length)) hang_up(c);
        else if (c->chunks.state == DONE) complete(c);
        return;
    }
    if (c->left >= 0 && (int64_t)length > c->left) {
        hang_up(c);
        return;
    }
    if (length) content(c, data, length);
    if (c->left < 0) return;
    c->left -= (int64_t)length;
    if (!c->left) complete(c);
}

static void take_head(struct conn *c, const char *data, size_t length) {
    size_t room = HEAD_BYTES - c->head_length, had = c->head_length;
    size_t copied = length < room ? length : room;
    memcpy(c->head + had, data, copied);
    c->head_length += copied;
    size_t end = head_end(c->head, c->head_length);
    struct framing framing;
    if (!end) {
        if (c->head_length == HEAD_BYTES) hang_up(c);
        return;
    }
    c->status = c->head_length > 12 ? atoi(c->head + 9) : 0;
    if (c->status < 200 || !read_framing(c->head, end, &framing)) {
        hang_up(c);
        return;
    }
    c->close = framing.close;
    c->left = framing.chunked ? -2 : framing.length;
    c->chunks = (struct chunks){0};
    if (c->left == -1) c->close = true;
    c->state = BODY;
    size_t taken = end - had;
    if (taken < length || c->left == 0) take_body(c, data + taken, length - taken);
}

static void receive(struct conn *c) {
    static char data[262144];
    ssize_t got = recv(c->fd, data, sizeof data, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        if (c->state == BODY && c->left == -1 && got == 0) {
            complete(c);
        } else {
            bool was_idle = c->state == IDLE;
            hang_up(c);
            c->opens_ns = now_ns() + (was_idle ? 0 : RETRY_NS);
        }
        return;
    }
    reads++;
    if (c->state == HEAD) take_head(c, data, (size_t)got);
    else if (c->state == BODY) take_body(c, data, (size_t)got);
    else hang_up(c); /* nobody asked */
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Sends what is due; returns when something is due next. */
static int64_t send_due(int64_t now) {
    int64_t next = ends_ns;
    if (rate > 0) {
        while (may_send(now)) {
            int64_t due = started_ns + (int64_t)((double)sent / rate * 1e9);
            if (due > now) return least(due, next);
            struct conn *c = NULL;
            while (idles && !c) {
                c = &conns[idle[--idles]];
                if (c->state != IDLE) c = NULL; /* it was closed meanwhile */
            }
            for (int n = 0; n < connections && !c; n++)
                if (conns[n].state == CLOSED && conns[n].opens_ns <= now && dial(&conns[n], now))
                    c = &conns[n];
            if (!c) return now + 1000000;
            send_on(c, due);
        }
        return next;
    }
    for (int n = 0; n < connections && may_send(now); n++) {
        struct conn *c = &conns[n];
        if (c->state != CLOSED) continue;
        if (c->opens_ns <= now && dial(c, now)) send_on(c, now);
        else next = least(next, c->opens_ns);
    }
    return next;
}

static int by_size(const void *a, const void *b) {
    uint32_t one = *(const uint32_t *)a, other = *(const uint32_t *)b;
    return one < other ? -1 : one > other;
}

static double part_ms(const uint32_t *sorted, long count, double part) {
    if (!count) return 0;
    long at = (long)(part * (double)count);
    return sorted[at < count ? at : count - 1] / 1000.0;
}

static void report(void) {
    qsort(took_us, (size_t)samples, sizeof *took_us, by_size);
    qsort(first_us, (size_t)samples, sizeof *first_us, by_size);
    qsort(gaps_us, (size_t)gaps, sizeof *gaps_us, by_size);
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    printf("{\"sent\":%ld,\"completed\":%ld,\"in_time\":%ld,\"ok\":%ld,\"cut\":%ld,\"lost\":%ld,"
           "\"refused_connections\":%ld,\"unfinished\":%ld,\"reads\":%ld,\"most_open\":%ld,",
           sent, completed, in_time, ok, cut, lost, refusals, sent - completed - lost, reads,
           most_open);
    int64_t until = in_time < completed || last_ns == 0 ? ends_ns : last_ns;
    printf("\"seconds\":%.6f,\"all_seconds\":%.6f,\"cpu_s\":%.6f,",
           (double)(until - started_ns) / 1e9, (double)(last_ns - started_ns) / 1e9,
           (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
               (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6);
    printf("\"p50_ms\":%.3f,\"p99_ms\":%.3f,\"max_ms\":%.3f,\"first_p50_ms\":%.3f,"
           "\"first_p99_ms\":%.3f,\"gap_p50_ms\":%.3f,\"gap_p99_ms\":%.3f,\"events\":%ld,"
           "\"said\":\"%s\"}\n",
           part_ms(took_us, samples, 0.5), part_ms(took_us, samples, 0.99),
           part_ms(took_us, samples, 1), part_ms(first_us, samples, 0.5),
           part_ms(first_us, samples, 0.99),
           part_ms(gaps_us, gaps, 0.5), part_ms(gaps_us, gaps, 0.99), events, complaint);
}

static void prepare(int count, char **words) {
    static char headers[4096];
    if (count < 4 || count % 2) exit(2);
    port = atoi(words[1]);
    for (int n = 4; n < count; n += 2) {
        const char *name = words[n], *value = words[n + 1];
        if (!strcmp(name, "--connections")) connections = atoi(value);
        else if (!strcmp(name, "--rate")) rate = atof(value);
        else if (!strcmp(name, "--requests")) most_requests = atol(value);
        else if (!strcmp(name, "--seconds")) length_ns = (int64_t)(atof(value) * 1e9);
        else if (!strcmp(name, "--drain")) drain_ns = (int64_t)(atof(value) * 1e9);
        else if (!strcmp(name, "--ramp")) ramp_ns = (int64_t)(atof(value) * 1e9);
        else if (!strcmp(name, "--skip")) skip_ns = (int64_t)(atof(value) * 1e9);
        else if (!strcmp(name, "--tail")) tail = value;
        else if (!strcmp(name, "--events")) by_events = atoi(value);
        else if (!strcmp(name, "--header"))
            strcat(strncat(headers, value, sizeof headers - strlen(headers) - 3), "\r\n");
        else exit(2);
    }
    if (connections < 1 || connections > MOST_CONNECTIONS) exit(2);
    FILE *file = fopen(words[3], "rb");
    static char body[32 << 20];
    size_t length = file ? fread(body, 1, sizeof body, file) : 0;
    if (!length) die(words[3]);
    fclose(file);
    request = malloc(length + 8192);
    request_length = (size_t)snprintf(request, 8192,
                                      "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: "
                                      "application/json\r\nContent-Length: %zu\r\n%s\r\n",
                                      words[2], port, length, headers);
    memcpy(request + request_length, body, length);
    request_length += length;
    number = memmem(request, request_length, "##########", NUMBER_BYTES);
}

static void stop_sending(int number) {
    (void)number;
    stops = 1;
}

int main(int count, char **words) {
    signal(SIGINT, stop_sending);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    prctl(PR_SET_TIMERSLACK, 1UL);
    prepare(count, words);
    took_us = calloc(MOST_SAMPLES, sizeof *took_us);
    first_us = calloc(MOST_SAMPLES, sizeof *first_us);
    gaps_us = calloc(MOST_SAMPLES, sizeof *gaps_us);
    conns = calloc((size_t)connections, sizeof *conns);
    poller = epoll_create1(EPOLL_CLOEXEC);
    started_ns = now_ns();
    ends_ns = started_ns + length_ns;
    for (int n = 0; n < connections; n++) {
        conns[n].fd = -1;
        conns[n].opens_ns = started_ns + ramp_ns * n / connections;
    }
    for (;;) {
        if (stops) ends_ns = least(ends_ns, now_ns());
        int64_t now = now_ns(), next = send_due(now);
        bool over = !may_send(now);
        if (over && (sent == completed + lost || now > ends_ns + drain_ns)) break;
        if (over) next = ends_ns + drain_ns;
        int64_t left = next > now ? next - now : 0;
        if (left > SECOND_NS) left = SECOND_NS;
        struct timespec wait = {left / SECOND_NS, left % SECOND_NS};
        struct epoll_event events[256];
        int ready = epoll_pwait2(poller, events, 256, &wait, NULL);
        if (ready < 0 && errno != EINTR) die("epoll_pwait2");
        for (int n = 0; n < ready; n++) {
            struct conn *c = events[n].data.ptr;
            if (c->fd >= 0) receive(c);
        }
    }
    report();
    return 0;
}
