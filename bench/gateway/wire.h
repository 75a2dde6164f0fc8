/* What the upstream and the load generator both need of HTTP/1.1, and the clock. Header only. */

#ifndef TIDEGATE_BENCH_WIRE_H
#define TIDEGATE_BENCH_WIRE_H

#define _GNU_SOURCE
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

#define SECOND_NS 1000000000LL
#define MOST_FDS 20000

static inline int64_t now_ns(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * SECOND_NS + at.tv_nsec;
}

static inline void die(const char *why) {
    perror(why);
    exit(1);
}

/* The framing of one message, as its head says. */
struct framing {
    int64_t length; /* -1 where none is named */
    bool chunked;
    bool close;
};

/* Where the head ends, after its empty line; 0 while it is incomplete. */
static inline size_t head_end(const char *data, size_t length) {
    const char *found = memmem(data, length, "\r\n\r\n", 4);
    return found ? (size_t)(found - data) + 4 : 0;
}

static inline bool named(const char *line, size_t length, const char *name) {
    size_t size = strlen(name);
    return length > size && line[size] == ':' && strncasecmp(line, name, size) == 0;
}

static inline bool holds(const char *value, size_t length, const char *word) {
    size_t size = strlen(word);
    for (size_t at = 0; at + size <= length; at++)
        if (strncasecmp(value + at, word, size) == 0) return true;
    return false;
}

/* Reads the header lines of a whole head; false where they are not HTTP, or ambiguous. */
static inline bool read_framing(const char *head, size_t length, struct framing *out) {
    *out = (struct framing){.length = -1};
    const char *end = head + length;
    const char *line = memchr(head, '\n', length);
    for (line++; line < end; line++) {
        const char *stop = memchr(line, '\n', (size_t)(end - line));
        if (!stop) return false;
        size_t size = (size_t)(stop - line);
        if (size && line[size - 1] == '\r') size--;
        if (!size) break;
        const char *colon = memchr(line, ':', size);
        if (!colon || colon == line || line[0] == ' ' || line[0] == '\t') return false;
        const char *value = colon + 1;
        size_t rest = size - (size_t)(value - line);
        if (named(line, size, "content-length")) {
            char *after;
            if (out->length >= 0) return false;
            out->length = strtoll(value, &after, 10);
            if (out->length < 0 || after == value) return false;
        } else if (named(line, size, "transfer-encoding")) {
            if (!holds(value, rest, "chunked")) return false;
            out->chunked = true;
        } else if (named(line, size, "connection") && holds(value, rest, "close")) {
            out->close = true;
        }
        line = stop;
    }
    return !(out->chunked && out->length >= 0);
}

/* A decoder of the chunked coding that takes its bytes as they come. */
enum chunk_state { SIZE, SIZE_END, DATA, DATA_END, TRAILER, DONE, BROKEN };
struct chunks {
    enum chunk_state state;
    int64_t left;
    int digits, line;
};

static inline int hex_digit(char one) {
    if (one >= '0' && one <= '9') return one - '0';
    one |= 0x20;
    return one >= 'a' && one <= 'f' ? one - 'a' + 10 : -1;
}

/* Takes up to `length` bytes, hands each run of content on, and returns how many were taken: fewer
   than all only when the body is `DONE`, or `BROKEN`. */
static inline size_t decode(struct chunks *in, const char *data, size_t length,
                            void (*content)(void *, const char *, size_t), void *to) {
    size_t at = 0;
    while (at < length && in->state != DONE && in->state != BROKEN) {
        if (in->state == DATA) {
            size_t run = length - at < (size_t)in->left ? length - at : (size_t)in->left;
            content(to, data + at, run);
            at += run;
            in->left -= (int64_t)run;
            if (!in->left) in->state = DATA_END;
            continue;
        }
        char one = data[at++];
        switch (in->state) {
        case SIZE: {
            int digit = hex_digit(one);
            if (digit >= 0 && in->digits < 8) {
                in->left = in->left * 16 + digit;
                in->digits++;
            } else if (in->digits && (one == '\r' || one == ';' || one == ' ')) {
                in->state = SIZE_END;
            } else {
                in->state = BROKEN;
            }
            break;
        }
        case SIZE_END:
            if (one != '\n') break; /* an extension, or the line feed to come */
            in->state = in->left ? DATA : TRAILER;
            in->digits = in->line = 0;
            break;
        case DATA_END:
            if (one == '\n') in->state = SIZE;
            else if (one != '\r') in->state = BROKEN;
            break;
        case TRAILER:
            if (one == '\n' && !in->line) in->state = DONE;
            else if (one == '\n') in->line = 0;
            else if (one != '\r') in->line++;
            break;
        default:
            break;
        }
    }
    return at;
}

#endif
