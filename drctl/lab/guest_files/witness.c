/*
 * The lab guest's witness, its process 1: proves its boot disk, then writes chains of numbered, hash-linked records.
 *
 * Every chain writes record n+1 only after record n is on the disk (O_DIRECT, write completed), alternating over vda and
 * vdb. Every record also says which records of the other chains had been completed before it was issued ("seen"), and
 * the newest token, i.e. a record of another guest that the host saw acknowledged. So any image of the disks that is
 * not a true prefix of what happened contradicts itself, and drctl/lab/judge.py can say where.
 *
 * Layouts are in drctl/lab/record.py; the geometry comes from there as -D macros. Commands and reports are lines on the
 * virtio-serial port org.drctl.witness.0, listed in drctl/lab/protocol.py.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/reboot.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define MAX_CHAINS 8
#define DIGEST 16
#define NAME 16
#define CHUNK (1 << 20)

struct superblock {
    char magic[8];
    uint32_t version, disk, chains, slots;
    uint8_t lab[16];
    char guest[NAME];
    uint64_t slots_offset, payload_offset, payload_length, payload_sum;
    uint32_t rate, sync_every, tokens, zero;
    uint8_t rest[BLOCK - 8 - 16 - 16 - NAME - 32 - 16 - DIGEST];
    uint8_t digest[DIGEST];
};

struct record {
    char magic[8];
    uint8_t lab[16];
    char guest[NAME];
    uint32_t chain, boot;
    uint64_t number, wall_ns;
    uint64_t seen[MAX_CHAINS];
    char token_guest[NAME];
    uint32_t token_chain, zero;
    uint64_t token_number;
    uint8_t token_digest[DIGEST];
    uint8_t previous[DIGEST];
    uint8_t body[BLOCK - 192 - DIGEST];
    uint8_t digest[DIGEST];
};
_Static_assert(sizeof(struct superblock) == BLOCK, "superblock is one block");
_Static_assert(sizeof(struct record) == BLOCK, "record is one block");

struct token {
    char guest[NAME];
    uint32_t chain;
    uint64_t number;
    uint8_t digest[DIGEST];
};

struct chain {
    pthread_t thread;
    uint32_t index;
    struct record *record; /* aligned; holds the newest completed record, or the one being written */
    atomic_uint_fast64_t completed;
};

static struct superblock super;
static struct chain chains[MAX_CHAINS];
static int disk[2] = {-1, -1};
static int console = -1, port = -1, wake = -1;
static uint32_t boot_number;
static atomic_uint rate;     /* records a second and chain; 0: as fast as it goes */
static atomic_bool writing;  /* chains may issue writes */
static atomic_bool encrypted; /* the payload is noise now */
static atomic_int in_flight; /* chains between "may issue" and "completed" */
static volatile sig_atomic_t ending; /* LINUX_REBOOT_CMD_… wanted by a signal */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct token token;       /* the newest, under lock */
static uint64_t token_serial;    /* counts tokens that were new, under lock */
static uint64_t token_used;      /* serial of the token that chain 0 wrote last, under lock */
static uint64_t reported_number; /* newest record of chain 0 whose digest is in `reported`, under lock */
static uint8_t reported[DIGEST];

/* ---- SHA-256 (FIPS 180-4) ---- */

static const uint32_t round_constant[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t rotate(uint32_t x, int by) { return x >> by | x << (32 - by); }

static void compress(uint32_t state[8], const uint8_t *block)
{
    uint32_t w[64], v[8];
    for (int i = 0; i < 16; i++) {
        memcpy(&w[i], block + 4 * i, 4);
        w[i] = __builtin_bswap32(w[i]);
    }
    for (int i = 16; i < 64; i++) {
        uint32_t low = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
        uint32_t high = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + low + w[i - 7] + high;
    }
    memcpy(v, state, sizeof v);
    for (int i = 0; i < 64; i++) {
        uint32_t s1 = rotate(v[4], 6) ^ rotate(v[4], 11) ^ rotate(v[4], 25);
        uint32_t first = v[7] + s1 + ((v[4] & v[5]) ^ (~v[4] & v[6])) + round_constant[i] + w[i];
        uint32_t s0 = rotate(v[0], 2) ^ rotate(v[0], 13) ^ rotate(v[0], 22);
        uint32_t second = s0 + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += first;
        v[0] = first + second;
    }
    for (int i = 0; i < 8; i++)
        state[i] += v[i];
}

/* The first 16 bytes of SHA-256 of the block without its last 16 bytes. */
static void digest_block(const void *block, uint8_t out[DIGEST])
{
    uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    const size_t length = BLOCK - DIGEST;
    uint8_t tail[64] = {0};
    for (size_t at = 0; at + 64 <= length; at += 64)
        compress(state, (const uint8_t *)block + at);
    memcpy(tail, (const uint8_t *)block + length / 64 * 64, length % 64);
    tail[length % 64] = 0x80;
    uint64_t bits = __builtin_bswap64(length * 8);
    memcpy(tail + 56, &bits, 8); /* length % 64 is 48: padding and length fit */
    compress(state, tail);
    for (int i = 0; i < DIGEST / 4; i++) {
        uint32_t word = __builtin_bswap32(state[i]);
        memcpy(out + 4 * i, &word, 4);
    }
}

/* ---- talking ---- */

static void say(const char *format, ...)
{
    char line[256];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    if (length > (int)sizeof line - 2)
        length = sizeof line - 2;
    line[length++] = '\n';
    if (console >= 0 && write(console, line, length) < 0)
        return;
}

/* One line to the host. Dropped when nobody listens there: the next report says it again. */
static bool report(const char *format, ...)
{
    static pthread_mutex_t whole_lines = PTHREAD_MUTEX_INITIALIZER;
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    if (port < 0 || length <= 0 || length > (int)sizeof line - 2)
        return false;
    line[length++] = '\n';
    pthread_mutex_lock(&whole_lines);
    ssize_t sent = write(port, line, length);
    pthread_mutex_unlock(&whole_lines);
    return sent == length;
}

static uint64_t wall_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000000000u + now.tv_nsec;
}

static void doze(unsigned milliseconds) { usleep(milliseconds * 1000); }

static void halt_here(const char *reason)
{
    say("DRCTL-GUEST-BROKEN %s", reason);
    for (;;) {
        report("BROKEN %s", reason);
        doze(1000);
    }
}

static void end(int command)
{
    atomic_store(&writing, false);
    for (int i = 0; i < 500 && atomic_load(&in_flight); i++)
        doze(2);
    sync();
    umount("/data");
    report("ENDING");
    say("DRCTL-GUEST-ENDING");
    doze(50); /* lets the port deliver */
    reboot(command);
}

/* ---- the disks ---- */

static off_t slot_offset(uint32_t chain, uint64_t number)
{
    uint64_t area = number % 2 ? VDB_AREA : VDA_AREA;
    return area + SLOTS_DISTANCE + ((uint64_t)chain * super.slots + number / 2 % super.slots) * BLOCK;
}

static int open_disk(const char *path, int extra)
{
    for (int i = 0; i < 500; i++) {
        int fd = open(path, O_RDWR | O_CLOEXEC | extra);
        if (fd >= 0)
            return fd;
        doze(10);
    }
    return -1;
}

static void *aligned(size_t size)
{
    void *memory = NULL;
    if (posix_memalign(&memory, BLOCK, size))
        halt_here("no memory");
    memset(memory, 0, size);
    return memory;
}

/* Reads the whole payload from the disk; true when its sum is the superblock's. */
static bool payload_is_whole(uint64_t *buffer)
{
    uint64_t sum = 0, index = 0;
    for (uint64_t at = 0; at < super.payload_length; at += CHUNK) {
        if (pread(disk[0], buffer, CHUNK, super.payload_offset + at) != CHUNK)
            return false;
        for (size_t i = 0; i < CHUNK / 8; i++, index++)
            sum += buffer[i] * (2 * index + 1);
    }
    return sum == super.payload_sum;
}

static bool is_mine(const struct record *record, uint32_t chain)
{
    return !memcmp(record->magic, "DRWITREC", 8) && !memcmp(record->lab, super.lab, 16) &&
           !memcmp(record->guest, super.guest, NAME) && record->chain == chain;
}

/* Finds the newest whole record of a chain: all slots' headers are looked at, the newest ones' digests are checked. */
static void recover(struct chain *chain, uint8_t *buffer)
{
    uint64_t newest = 0;
    for (int d = 0; d < 2; d++)
        for (uint64_t at = 0; at < (uint64_t)super.slots * BLOCK; at += CHUNK) {
            if (pread(disk[d], buffer, CHUNK, slot_offset(chain->index, d) + at) != CHUNK)
                halt_here("can't read the slots");
            for (size_t i = 0; i < CHUNK; i += BLOCK) {
                const struct record *record = (const struct record *)(buffer + i);
                if (is_mine(record, chain->index) && record->number > newest)
                    newest = record->number;
            }
        }
    for (; newest; newest--) {
        uint8_t found[DIGEST];
        if (pread(disk[newest % 2], chain->record, BLOCK, slot_offset(chain->index, newest)) != BLOCK)
            halt_here("can't read a slot");
        digest_block(chain->record, found);
        if (is_mine(chain->record, chain->index) && chain->record->number == newest &&
            !memcmp(found, chain->record->digest, DIGEST))
            break;
    }
    if (!newest)
        memset(chain->record, 0, BLOCK);
    atomic_store(&chain->completed, newest);
    say("resumed chain %u at %" PRIu64, chain->index, newest);
    report("RESUMED %u %" PRIu64, chain->index, newest);
}

/* ---- chains ---- */

static void fill_body(struct record *record)
{
    /* Half noise, half text: about as compressible as a server's writes. */
    uint64_t noise = (record->number << 8 | record->chain) * 0x9e3779b97f4a7c15u + 1;
    size_t half = sizeof record->body / 2 / 8 * 8;
    for (size_t i = 0; i < half; i += 8) {
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        memcpy(record->body + i, &noise, 8);
    }
    memset(record->body + half, 0, sizeof record->body - half);
    snprintf((char *)record->body + half, 128, "%s chain %u record %" PRIu64, super.guest, record->chain, record->number);
}

static void compose(struct chain *chain, uint64_t number)
{
    struct record *record = chain->record;
    uint8_t previous[DIGEST];
    memcpy(previous, record->digest, DIGEST); /* all zero before record 1 */
    memset(record, 0, sizeof *record);
    memcpy(record->magic, "DRWITREC", 8);
    memcpy(record->lab, super.lab, sizeof record->lab);
    memcpy(record->guest, super.guest, NAME);
    record->chain = chain->index;
    record->boot = boot_number;
    record->number = number;
    record->wall_ns = wall_ns();
    for (uint32_t i = 0; i < super.chains; i++)
        record->seen[i] = atomic_load(&chains[i].completed);
    pthread_mutex_lock(&lock);
    memcpy(record->token_guest, token.guest, NAME);
    record->token_chain = token.chain;
    record->token_number = token.number;
    memcpy(record->token_digest, token.digest, DIGEST);
    if (chain->index == 0)
        token_used = token_serial;
    pthread_mutex_unlock(&lock);
    memcpy(record->previous, previous, DIGEST);
    fill_body(record);
    digest_block(record, record->digest);
}

static void pace(struct timespec *next)
{
    struct timespec now;
    unsigned wanted = atomic_load(&rate);
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (!wanted) {
        *next = now;
        return;
    }
    next->tv_nsec += 1000000000u / wanted;
    next->tv_sec += next->tv_nsec / 1000000000;
    next->tv_nsec %= 1000000000;
    if (next->tv_sec < now.tv_sec - 1) /* never make up for more than a second */
        *next = now;
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, next, NULL);
}

/* Chain 0 of a lab with several guests goes on only when another guest's record was acknowledged. */
static void await_token(const struct chain *chain)
{
    if (chain->index || !super.tokens)
        return;
    pthread_mutex_lock(&lock);
    while (token_used == token_serial)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

static bool may_write(void)
{
    atomic_fetch_add(&in_flight, 1);
    if (atomic_load(&writing))
        return true;
    atomic_fetch_sub(&in_flight, 1);
    return false;
}

static void complete(struct chain *chain, uint64_t number)
{
    atomic_store(&chain->completed, number);
    if (chain->index)
        return;
    pthread_mutex_lock(&lock);
    reported_number = number;
    memcpy(reported, chain->record->digest, DIGEST);
    pthread_mutex_unlock(&lock);
    eventfd_write(wake, 1);
}

static void *run_chain(void *argument)
{
    struct chain *chain = argument;
    struct timespec next;
    clock_gettime(CLOCK_MONOTONIC, &next);
    for (;;) {
        await_token(chain);
        pace(&next);
        if (!may_write()) {
            doze(20);
            continue;
        }
        uint64_t number = atomic_load(&chain->completed) + 1;
        int fd = disk[number % 2];
        compose(chain, number);
        bool done = pwrite(fd, chain->record, BLOCK, slot_offset(chain->index, number)) == BLOCK;
        if (done && super.sync_every && number % super.sync_every == 0)
            done = fdatasync(fd) == 0;
        if (done)
            complete(chain, number);
        atomic_fetch_sub(&in_flight, 1);
        if (!done) {
            say("DRCTL-GUEST-IO-ERROR chain %u record %" PRIu64 " errno %d", chain->index, number, errno);
            report("ERROR %u %" PRIu64 " %d", chain->index, number, errno);
            return NULL;
        }
    }
}

/* ---- commands ---- */

static void hello(void)
{
    report("UP %s %08x %u", super.guest, boot_number, super.chains);
}

static bool unhex(const char *text, uint8_t out[DIGEST])
{
    if (strlen(text) != 2 * DIGEST)
        return false;
    for (int i = 0; i < DIGEST; i++) {
        unsigned value;
        if (sscanf(text + 2 * i, "%2x", &value) != 1)
            return false;
        out[i] = value;
    }
    return true;
}

static void take_token(const char *line)
{
    struct token got = {0};
    char guest[NAME] = {0}, hex[2 * DIGEST + 1] = {0};
    if (sscanf(line, "token %15s %" SCNu32 " %" SCNu64 " %32s", guest, &got.chain, &got.number, hex) < 3)
        return;
    if (strcmp(guest, "-") && !unhex(hex, got.digest))
        return;
    pthread_mutex_lock(&lock);
    if (!strcmp(guest, "-")) { /* the relay starts the ring again: nothing foreign to remember */
        token_serial++;
    } else if (strncmp(guest, token.guest, NAME) || memcmp(got.digest, token.digest, DIGEST)) {
        memcpy(got.guest, guest, NAME);
        token = got;
        token_serial++;
    }
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

/* What ransomware does: overwrites the data areas of both disks with noise. */
static void corrupt(uint64_t *buffer)
{
    atomic_store(&writing, false);
    while (atomic_load(&in_flight))
        doze(1);
    uint64_t noise = wall_ns() | 1, area[2] = {VDA_AREA, VDB_AREA}, length[2] = {VDA_LENGTH, VDB_LENGTH};
    for (int d = 0; d < 2; d++)
        for (uint64_t at = 0; at < length[d]; at += CHUNK) {
            for (size_t i = 0; i < CHUNK / 8; i++) {
                noise ^= noise << 13;
                noise ^= noise >> 7;
                noise ^= noise << 17;
                buffer[i] = noise;
            }
            if (pwrite(disk[d], buffer, CHUNK, area[d] + at) != CHUNK)
                halt_here("can't corrupt");
        }
    fdatasync(disk[0]);
    fdatasync(disk[1]);
    say("DRCTL-GUEST-CORRUPTED");
    report("DONE corrupt");
}

/* Milder ransomware: a CHUNK of the guest's own file (its payload) is turned into noise by a key stream, and back by the
 * same. The chains go on. A guest that boots from an encrypted file finds that its sum does not match, and halts. */
static void crypt_payload(uint64_t *buffer, const char *line)
{
    uint64_t key = 0x9e3779b97f4a7c15;
    if (pread(disk[0], buffer, CHUNK, super.payload_offset) != CHUNK)
        halt_here("can't read the payload");
    for (size_t i = 0; i < CHUNK / 8; i++) {
        key ^= key << 13;
        key ^= key >> 7;
        key ^= key << 17;
        buffer[i] ^= key;
    }
    if (pwrite(disk[0], buffer, CHUNK, super.payload_offset) != CHUNK)
        halt_here("can't write the payload");
    fdatasync(disk[0]);
    report("DONE %s", line);
}

static void obey(const char *line, void *buffer)
{
    unsigned wanted;
    if (!strncmp(line, "token ", 6)) {
        take_token(line);
    } else if (!strcmp(line, "hello")) {
        hello();
    } else if (!strcmp(line, "rate max")) {
        atomic_store(&rate, 0);
        report("DONE %s", line);
    } else if (sscanf(line, "rate %u", &wanted) == 1 && wanted) {
        atomic_store(&rate, wanted);
        report("DONE %s", line);
    } else if (!strcmp(line, "stop")) {
        atomic_store(&writing, false);
        while (atomic_load(&in_flight))
            doze(1);
        report("DONE stop");
    } else if (!strcmp(line, "go")) {
        atomic_store(&writing, true);
        report("DONE go");
    } else if (!strcmp(line, "corrupt")) {
        corrupt(buffer);
    } else if (!strcmp(line, "encrypt")) {
        if (!atomic_exchange(&encrypted, true))
            crypt_payload(buffer, line);
    } else if (!strcmp(line, "decrypt")) {
        if (atomic_exchange(&encrypted, false))
            crypt_payload(buffer, line);
    } else if (!strcmp(line, "power off")) {
        end(LINUX_REBOOT_CMD_POWER_OFF);
    } else if (!strcmp(line, "reboot")) {
        end(LINUX_REBOOT_CMD_RESTART);
    } else {
        report("UNKNOWN %.100s", line);
    }
}

static void read_commands(void *buffer)
{
    static char pending[4096];
    static size_t used;
    ssize_t got = read(port, pending + used, sizeof pending - 1 - used);
    if (got <= 0)
        return;
    used += got;
    char *newline;
    while ((newline = memchr(pending, '\n', used))) {
        *newline = 0;
        obey(pending, buffer);
        used -= newline + 1 - pending;
        memmove(pending, newline + 1, used);
    }
    if (used == sizeof pending - 1)
        used = 0; /* no line of ours is that long */
}

static void report_completed(void)
{
    static uint64_t sent[MAX_CHAINS], sent_digest;
    static time_t said;
    uint64_t now[MAX_CHAINS];
    char line[320];
    int length = snprintf(line, sizeof line, "ACK %08x", boot_number);
    bool news = time(NULL) != said; /* once a second also without news: the host may just have come */
    for (uint32_t i = 0; i < super.chains; i++) {
        now[i] = atomic_load(&chains[i].completed);
        news |= now[i] != sent[i];
        length += snprintf(line + length, sizeof line - length, " %" PRIu64, now[i]);
    }
    if (news && report("%s", line)) {
        memcpy(sent, now, sizeof sent);
        said = time(NULL);
    }
    pthread_mutex_lock(&lock);
    uint64_t number = reported_number;
    char hex[2 * DIGEST + 1];
    for (int i = 0; i < DIGEST; i++)
        sprintf(hex + 2 * i, "%02x", reported[i]);
    pthread_mutex_unlock(&lock);
    if (number && number != sent_digest && report("TOKEN 0 %" PRIu64 " %s", number, hex))
        sent_digest = number;
}

static void serve(void *buffer)
{
    for (;;) {
        struct pollfd polled[2] = {{.fd = wake, .events = POLLIN}, {.fd = port, .events = POLLIN}};
        if (poll(polled, port < 0 ? 1 : 2, REPORT_MILLISECONDS) < 0 && errno != EINTR)
            doze(10);
        eventfd_t count;
        if (polled[0].revents & POLLIN)
            eventfd_read(wake, &count);
        if (port >= 0 && polled[1].revents & POLLHUP)
            doze(100); /* the host is away: poll returns at once, and a read says "end" */
        else if (port >= 0 && polled[1].revents & POLLIN)
            read_commands(buffer);
        report_completed();
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ; /* process 1 reaps */
        if (ending)
            end(ending);
    }
}

/* ---- start ---- */

static int open_port(const char *name)
{
    for (int attempt = 0; attempt < 100; attempt++) {
        DIR *ports = opendir("/sys/class/virtio-ports");
        struct dirent *entry;
        while (ports && (entry = readdir(ports))) {
            char path[320], found[64] = {0};
            snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
            FILE *file = fopen(path, "re");
            if (file && fscanf(file, "%63s", found) == 1 && !strcmp(found, name)) {
                fclose(file);
                snprintf(path, sizeof path, "/dev/%s", entry->d_name);
                closedir(ports);
                return open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
            }
            if (file)
                fclose(file);
        }
        if (ports)
            closedir(ports);
        doze(20);
    }
    return -1;
}

static void wish_to_end(int signal_number)
{
    ending = signal_number == SIGTERM ? LINUX_REBOOT_CMD_POWER_OFF : LINUX_REBOOT_CMD_RESTART;
}

static void read_superblock(void)
{
    uint8_t found[DIGEST];
    struct superblock *block = aligned(BLOCK);
    if (pread(disk[0], block, BLOCK, VDA_AREA) != BLOCK)
        halt_here("can't read the superblock");
    digest_block(block, found);
    if (memcmp(block->magic, "DRWITSUP", 8) || memcmp(found, block->digest, DIGEST))
        halt_here("no superblock");
    if (block->version != 1 || block->chains < 1 || block->chains > MAX_CHAINS)
        halt_here("unknown superblock");
    super = *block;
    free(block);
}

static void start_agent(void)
{
    if (fork())
        return;
    setsid();
    execl("/bin/busybox", "sh", "/agent.sh", (char *)NULL);
    _exit(1);
}

int main(void)
{
    console = open("/dev/console", O_RDWR | O_NOCTTY | O_CLOEXEC);
    signal(SIGTERM, wish_to_end);
    signal(SIGINT, wish_to_end);
    signal(SIGPIPE, SIG_IGN);
    if (getpid() == 1)
        reboot(LINUX_REBOOT_CMD_CAD_OFF);
    if (getenv("witness") && !strcmp(getenv("witness"), "probe")) {
        say("DRCTL-GUEST-PROBE"); /* the lab only asks whether this machine runs guests */
        reboot(LINUX_REBOOT_CMD_POWER_OFF);
    }
    syscall(SYS_getrandom, &boot_number, sizeof boot_number, 1 /* GRND_NONBLOCK */);
    boot_number ^= (uint32_t)(wall_ns() >> 10);
    wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    disk[0] = open_disk("/dev/vda", O_DIRECT);
    disk[1] = open_disk("/dev/vdb", O_DIRECT);
    if (disk[0] < 0 || disk[1] < 0)
        halt_here("no disks");
    void *buffer = aligned(CHUNK);
    read_superblock();
    bool whole = payload_is_whole(buffer);
    port = open_port("org.drctl.witness.0");
    if (!whole)
        halt_here("payload does not match its sum");
    say("DRCTL-GUEST-UP %s boot %08x payload %" PRIu64 " bytes verified", super.guest, boot_number, super.payload_length);
    hello();
    for (uint32_t i = 0; i < super.chains; i++) {
        chains[i].index = i;
        chains[i].record = aligned(BLOCK);
        recover(&chains[i], buffer);
    }
    atomic_store(&rate, super.rate);
    atomic_store(&writing, true);
    reported_number = atomic_load(&chains[0].completed);
    memcpy(reported, chains[0].record->digest, DIGEST);
    for (uint32_t i = 0; i < super.chains; i++)
        if (pthread_create(&chains[i].thread, NULL, run_chain, &chains[i]))
            halt_here("no thread");
    start_agent();
    serve(buffer);
}
