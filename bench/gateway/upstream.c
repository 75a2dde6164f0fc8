/* The provider that every gateway is measured in front of: `upstream PORT`, on loopback.

   One thread, one epoll. Answers OpenAI's `/chat/completions` and Gemini's `:generateContent` with
   1 KB of JSON, or with a stream of server-sent events where it is asked for one, each event in a
   write of its own. `GET /control?delay_us=&chunks=&gap_us=&status=` sets, for all calls from then on,
   how long an answer takes, of how many events a stream is and how far they are apart, and with which
   status calls are refused if they are, and begins to count again; `GET /stats` tells what came. Invariant: `in_flight` counts the calls whose request is
   here in full and whose answer has not been handed to the kernel in full. */

#include "answers.h"
#include "wire.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST_REQUEST_BYTES (32 << 20)
#define MOST_CHUNKS 1000

struct conn {
    int fd;
    uint32_t life; /* how often this number has been a connection: timers of past ones are void */
    char *in;
    size_t in_length, in_size;
    bool answering, close, polled_out;
    const struct dialect *dialect;
    bool usage;
    int frame, frames; /* 0 frames: one whole answer */
    int64_t due_ns;
    const char *out;
    size_t out_left;
};
static struct conn conns[MOST_FDS];

static int poller, listener;
static int64_t delay_ns, gap_ns = 1000000;
static int stream_chunks = 50, refusal = 200;
static long requests, answers, cut, refused, in_flight, max_in_flight;

struct timer {
    int64_t due_ns;
    int fd;
    uint32_t life;
};
static struct timer heap[MOST_FDS * 2];
static int timers;

static void push_timer(struct conn *c, int64_t due_ns) {
    if (timers == MOST_FDS * 2) {
        fprintf(stderr, "too many timers\n");
        exit(1);
    }
    int at = timers++;
    while (at && heap[(at - 1) / 2].due_ns > due_ns) {
        heap[at] = heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    heap[at] = (struct timer){due_ns, c->fd, c->life};
    c->due_ns = due_ns;
}

static struct timer pop_timer(void) {
    struct timer first = heap[0], last = heap[--timers];
    int at = 0;
    for (int child; (child = 2 * at + 1) < timers; at = child) {
        if (child + 1 < timers && heap[child + 1].due_ns < heap[child].due_ns) child++;
        if (heap[child].due_ns >= last.due_ns) break;
        heap[at] = heap[child];
    }
    heap[at] = last;
    return first;
}

static void poll_for(struct conn *c, bool out) {
    if (c->polled_out == out) return;
    c->polled_out = out;
    struct epoll_event event = {.events = EPOLLIN | (out ? EPOLLOUT : 0u), .data.fd = c->fd};
    epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &event);
}

static void end(struct conn *c) {
    if (c->answering) in_flight--, cut++;
    close(c->fd);
    free(c->in);
    *c = (struct conn){.fd = -1, .life = c->life + 1};
}

/* Writes what is due and can be written; false where that ended the connection. */
static bool write_on(struct conn *c, int64_t now) {
    for (;;) {
        while (c->out_left) {
            ssize_t sent = send(c->fd, c->out, c->out_left, MSG_NOSIGNAL | MSG_DONTWAIT);
            if (sent < 0 && errno == EAGAIN) {
                poll_for(c, true);
                return true;
            }
            if (sent <= 0) {
                end(c);
                return false;
            }
            c->out += sent;
            c->out_left -= (size_t)sent;
        }
        poll_for(c, false);
        if (c->frame >= c->frames) break;
        if (c->frame && c->due_ns > now) return true; /* its timer is set */
        const struct dialect *d = c->dialect;
        const struct text *next = c->frame == 0              ? &d->first
                                  : c->frame + 1 < c->frames ? &d->middle
                                  : c->usage                 ? &d->last_usage
                                                             : &d->last;
        c->out = next->bytes;
        c->out_left = next->length;
        c->frame++;
        if (c->frame < c->frames) push_timer(c, (c->frame == 1 ? now : c->due_ns) + gap_ns);
    }
    if (c->answering) in_flight--, answers++;
    c->answering = false;
    if (c->close) {
        end(c);
        return false;
    }
    return true;
}

static void answer_now(struct conn *c, int status, const char *body) {
    static char text[4096];
    c->out_left = (size_t)snprintf(text, sizeof text,
                                   "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\n"
                                   "Content-Length: %zu\r\n%s\r\n%s",
                                   status, status == 200 ? "OK" : "Error", strlen(body),
                                   status == 400 ? "Connection: close\r\n" : "", body);
    c->out = text; /* short: the kernel takes it at once, or the connection is ended */
    c->frame = c->frames = 0;
    if (status != 200) refused++;
    if (status == 400) c->close = true;
    if (write_on(c, now_ns()) && c->out_left) end(c);
}

static int64_t number_in(const char *path, const char *name, int64_t otherwise) {
    const char *found = strstr(path, name);
    return found ? strtoll(found + strlen(name), NULL, 10) : otherwise;
}

static void control(struct conn *c, const char *path) {
    if (strncmp(path, "/control", 8) == 0) {
        delay_ns = number_in(path, "delay_us=", 0) * 1000;
        gap_ns = number_in(path, "gap_us=", 1000) * 1000;
        stream_chunks = (int)number_in(path, "chunks=", 50);
        refusal = (int)number_in(path, "status=", 200);
        if (stream_chunks < 2 || stream_chunks > MOST_CHUNKS) stream_chunks = 50;
        requests = answers = cut = refused = 0;
        max_in_flight = in_flight;
    }
    char body[512];
    snprintf(body, sizeof body,
             "{\"requests\":%ld,\"answers\":%ld,\"cut\":%ld,\"refused\":%ld,\"in_flight\":%ld,"
             "\"max_in_flight\":%ld}",
             requests, answers, cut, refused, in_flight, max_in_flight);
    answer_now(c, 200, body);
}

static bool says(const char *body, size_t length, const char *name) {
    size_t size = strlen(name);
    const char *at = memmem(body, length, name, size);
    if (!at) return false;
    for (at += size; at < body + length && (*at == ' ' || *at == ':'); at++) continue;
    return (size_t)(body + length - at) >= 4 && memcmp(at, "true", 4) == 0;
}

static void call(struct conn *c, const char *path, const char *body, size_t length) {
    bool streamed = false;
    if (strstr(path, "/chat/completions")) {
        c->dialect = &dialects[OPENAI];
        streamed = says(body, length, "\"stream\"");
        c->usage = streamed && says(body, length, "\"include_usage\"");
    } else if (strstr(path, ":generateContent") || strstr(path, ":streamGenerateContent")) {
        c->dialect = &dialects[GEMINI];
        streamed = strstr(path, ":stream") != NULL;
    } else {
        answer_now(c, 404, "{\"error\":{\"code\":404,\"message\":\"no such path\"}}");
        return;
    }
    requests++;
    if (refusal != 200) {
        answer_now(c, refusal, "{\"error\":{\"message\":\"as asked\",\"type\":\"server_error\"}}");
        return;
    }
    if (++in_flight > max_in_flight) max_in_flight = in_flight;
    c->answering = true;
    c->frame = 0;
    c->frames = streamed ? stream_chunks : 0;
    if (!streamed) {
        c->out = c->dialect->whole.bytes;
        c->out_left = c->dialect->whole.length;
    }
    int64_t now = now_ns();
    if (delay_ns) push_timer(c, now + delay_ns);
    else write_on(c, now);
}

static void gather(void *to, const char *data, size_t length) {
    struct text *body = to; /* more than fits is of no interest: only flags are looked for */
    size_t room = sizeof body->bytes - body->length;
    memcpy(body->bytes + body->length, data, length < room ? length : room);
    body->length += length < room ? length : room;
}

/* Answers one request of those that have come in; false while there is no whole one. */
static bool read_request(struct conn *c) {
    size_t head = head_end(c->in, c->in_length);
    if (!head) return false;
    char method[8], path[512];
    int minor;
    struct framing framing;
    if (sscanf(c->in, "%7[A-Z] %511[^ \r\n] HTTP/1.%d\r", method, path, &minor) != 3 ||
        !read_framing(c->in, head, &framing)) {
        answer_now(c, 400, "{\"error\":{\"code\":400,\"message\":\"not HTTP/1.1\"}}");
        return false;
    }
    static struct text decoded;
    const char *body = c->in + head;
    size_t length, taken, had = c->in_length - head;
    if (framing.chunked) {
        struct chunks chunks = {0};
        decoded.length = 0;
        taken = decode(&chunks, body, had, gather, &decoded);
        if (chunks.state == BROKEN) {
            answer_now(c, 400, "{\"error\":{\"code\":400,\"message\":\"broken chunks\"}}");
            return false;
        }
        if (chunks.state != DONE) return false;
        body = decoded.bytes;
        length = decoded.length;
    } else {
        length = taken = framing.length < 0 ? 0 : (size_t)framing.length;
        if (had < taken) return false;
    }
    c->close = framing.close || minor == 0;
    uint32_t life = c->life;
    size_t rest = had - taken;
    if (strcmp(method, "POST") == 0) call(c, path, body, length);
    else if (strncmp(path, "/control", 8) == 0 || strcmp(path, "/stats") == 0) control(c, path);
    else answer_now(c, 404, "{\"error\":{\"code\":404,\"message\":\"no such path\"}}");
    if (c->life != life) return false;
    memmove(c->in, c->in + head + taken, rest);
    c->in_length = rest;
    return rest > 0;
}

static void read_requests(struct conn *c) {
    while (c->fd >= 0 && !c->answering && !c->out_left && read_request(c)) continue;
}

static void receive(struct conn *c) {
    if (c->in_size - c->in_length < 2048) {
        if (c->in_size >= MOST_REQUEST_BYTES) {
            end(c);
            return;
        }
        c->in_size = c->in_size ? c->in_size * 2 : 4096;
        if (!(c->in = realloc(c->in, c->in_size))) die("realloc");
    }
    ssize_t got = recv(c->fd, c->in + c->in_length, c->in_size - c->in_length - 1, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        end(c);
        return;
    }
    c->in_length += (size_t)got;
    c->in[c->in_length] = 0;
    read_requests(c);
}

static void welcome(void) {
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        if (fd >= MOST_FDS) {
            close(fd);
            continue;
        }
        int on = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        conns[fd] = (struct conn){.fd = fd, .life = conns[fd].life + 1};
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
    }
}

static void run_timers(void) {
    int64_t now = now_ns();
    while (timers && heap[0].due_ns <= now) {
        struct timer due = pop_timer();
        struct conn *c = &conns[due.fd];
        if (c->fd < 0 || c->life != due.life || !c->answering) continue;
        if (c->polled_out) continue; /* goes on once the client has read */
        if (write_on(c, now)) read_requests(c);
    }
}

int main(int count, char **words) {
    if (count != 2) return 2;
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    prctl(PR_SET_TIMERSLACK, 1UL);
    prepare();
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)atoi(words[1])),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int on = 1;
    listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, sizeof address)) die("bind");
    if (listen(listener, 4096)) die("listen");
    poller = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener};
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        struct epoll_event events[256];
        struct timespec wait, *until = NULL;
        if (timers) {
            int64_t left = heap[0].due_ns - now_ns();
            if (left < 0) left = 0;
            wait = (struct timespec){left / SECOND_NS, left % SECOND_NS};
            until = &wait;
        }
        int ready = epoll_pwait2(poller, events, 256, until, NULL);
        if (ready < 0 && errno != EINTR) die("epoll_pwait2");
        for (int n = 0; n < ready; n++) {
            struct conn *c = &conns[events[n].data.fd];
            if (events[n].data.fd == listener) {
                welcome();
            } else if (c->fd >= 0) {
                if (events[n].events & EPOLLOUT) {
                    if (!write_on(c, now_ns())) continue;
                    read_requests(c);
                }
                if (c->fd >= 0 && events[n].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(c);
            }
        }
        run_timers();
    }
}
