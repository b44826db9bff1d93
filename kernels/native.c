/* The layers of a stage for a few tokens on a CPU, computed in float32, with matrices and cache in
 * float32 or bfloat16: see native.py for the theory.
 *
 * A plain shared library, called through ctypes; setuptools compiles it as an extension module
 * only because that is what setuptools can compile. It needs neither Python's headers nor any
 * library but libc. On x86 the arithmetic is compiled for three instruction sets and the best one
 * is chosen at run time; elsewhere once, for the compiler's default. Each twice, for both kinds of
 * stored numbers.
 *
 * Threads are a team of our own: all run the same program on their share of the columns, heads or
 * sessions, and wait for each other six times a layer. A waiting thread spins for some tens of
 * microseconds, which is longer than its partners usually take, and then sleeps. OpenMP was
 * rejected: it would bring a second runtime into PyTorch's process. */

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define MIN(a, b) ((a) < (b) ? (a) : (b))

#define ROWS 64   /* most rows of a batch */
#define MANY 13   /* rows from which on tiles are faster than strips */
#define MOST 128  /* rows of one product by tiles */
#define DEPTH 128 /* rows of weights between two loads of sums */
#define TILE 1024 /* columns: their sums stay in the nearest cache, and rows span whole pages */
#define STRIDE (TILE + 16) /* of sums: by a power of two they would fight for cache sets */
#define CHUNK 64  /* keys between two corrections of the softmax */
#define HEADS 8   /* query heads that share a reading of the keys */
#define SPINS 1000

/* The records that native.py mirrors. */

struct shape {
    int64_t hidden, intermediate, heads, kv_heads, head_dim;
    float eps;
};

struct layer {
    const float *input_norm, *qkv_bias, *qk_norm, *o_bias, *post_norm, *gate_up_bias, *down_bias;
    const void *qkv, *o, *gate_up, *down; /* [in, out], of stored numbers */
    void *cache;                          /* likewise [slots, 2, kv heads, head dim] */
    int64_t window;                       /* 0 for none */
};

struct batch {
    int64_t rows, block_size;
    const float *cos, *sin;           /* [rows, head dim] */
    const int64_t *positions, *slots; /* of each row */
    const int64_t *tables, *blocks;   /* where in `blocks` the block table of each row begins */
};

struct pass { /* all layers of a stage for one batch */
    const struct shape *shape;
    const struct layer *layers;
    int64_t count;
    const struct batch *batch;
    float *x, *scratch;
};

struct head { /* logits = norm(x) @ weight */
    int64_t rows, hidden, vocabulary;
    const float *x, *norm;
    const void *weight; /* stored numbers */
    float *logits, *scratch;
    float eps;
};

struct product { /* y = x @ weight + bias; or y += that, by way of room `[MOST, width]` if given */
    int64_t rows, depth, width, x_stride;
    const float *x, *bias;
    const void *weight; /* stored numbers */
    float *y, *room;
};

/* Threads: everyone runs `run` on `job` and meets the others before and after. */

struct team;
typedef void program(struct team *, int thread, const void *job);

struct member {
    struct team *team;
    int index;
    pthread_t thread;
};

struct team {
    int threads, stop;
    atomic_int arrived;
    atomic_uint round;
    pthread_mutex_t lock;
    pthread_cond_t next;
    program *decode, *head, *product;
    program *run;
    const void *job;
    struct member members[]; /* the first is the caller, who has no thread here */
};

static void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Return once all threads of the team have called this. */
static void wait_for_all(struct team *team) {
    if (team->threads == 1) return;
    const unsigned round = atomic_load(&team->round);
    if (atomic_fetch_add(&team->arrived, 1) == team->threads - 1) {
        atomic_store(&team->arrived, 0);
        pthread_mutex_lock(&team->lock);
        atomic_store(&team->round, round + 1);
        pthread_cond_broadcast(&team->next);
        pthread_mutex_unlock(&team->lock);
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load(&team->round) != round) return;
        pause_briefly();
    }
    pthread_mutex_lock(&team->lock);
    while (atomic_load(&team->round) == round) pthread_cond_wait(&team->next, &team->lock);
    pthread_mutex_unlock(&team->lock);
}

struct range {
    int64_t first, end;
};

/* A thread's share of n things. */
static struct range share(int64_t n, int thread, int threads) {
    return (struct range){n * thread / threads, n * (thread + 1) / threads};
}

/* A thread's share of n columns: whole cache lines. */
static struct range columns(int64_t n, int thread, int threads) {
    const struct range lines = share((n + 15) / 16, thread, threads);
    return (struct range){MIN(n, lines.first * 16), MIN(n, lines.end * 16)};
}

/* The arithmetic, for each instruction set. */

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(x) JOIN(x, VARIANT)

#define LANES 4
#define HALF 0
#define VARIANT plain
#include "native_layers.h"
#undef HALF
#undef VARIANT
#define HALF 1
#define VARIANT plain_half
#include "native_layers.h"
#undef HALF
#undef VARIANT
#undef LANES

#ifdef __x86_64__

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define LANES 8
#define HALF 0
#define VARIANT avx2
#include "native_layers.h"
#undef HALF
#undef VARIANT
#define HALF 1
#define VARIANT avx2_half
#include "native_layers.h"
#undef HALF
#undef VARIANT
#undef LANES
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512dq,avx512vl"))),        \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512vl")
#endif
#define LANES 16
#define HALF 0
#define VARIANT avx512
#include "native_layers.h"
#undef HALF
#undef VARIANT
#define HALF 1
#define VARIANT avx512_half
#include "native_layers.h"
#undef HALF
#undef VARIANT
#undef LANES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

static const struct variant {
    const char *name;
    program *decode[2], *head[2], *product[2]; /* for stored float and bfloat16 */
} variants[] = {
#ifdef __x86_64__
    {"avx512",
     {decode_avx512, decode_avx512_half},
     {head_avx512, head_avx512_half},
     {product_avx512, product_avx512_half}},
    {"avx2",
     {decode_avx2, decode_avx2_half},
     {head_avx2, head_avx2_half},
     {product_avx2, product_avx2_half}},
#endif
    {"plain",
     {decode_plain, decode_plain_half},
     {head_plain, head_plain_half},
     {product_plain, product_plain_half}},
};

/* The first of the variants that runs here; so do all after it. */
static const struct variant *best(void) {
    int first = 0;
#ifdef __x86_64__
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    first = avx512 ? 0 : avx2 ? 1 : 2;
#endif
    return variants + first;
}

/* What native.py calls. */

static void run(struct team *team, program *run, const void *job) {
    team->run = run;
    team->job = job;
    wait_for_all(team);
    run(team, 0, job);
    wait_for_all(team);
}

/* Name of the index-th best instruction set that runs here, or NULL. */
const char *hexswarm_instructions(int64_t index) {
    const struct variant *end = variants + sizeof variants / sizeof *variants;
    return index < end - best() ? best()[index].name : NULL;
}

/* Floats of scratch that a pass of `rows` rows needs. */
int64_t hexswarm_scratch(const struct shape *s, int64_t rows, int64_t threads) {
    const int64_t heads = 2 * s->heads + 2 * s->kv_heads;
    return rows * (heads * s->head_dim + 2 * s->intermediate + threads * s->hidden);
}

void hexswarm_decode(struct team *team, const struct pass *pass) {
    run(team, team->decode, pass);
}

void hexswarm_head(struct team *team, const struct head *head) {
    run(team, team->head, head);
}

void hexswarm_product(struct team *team, const struct product *product) {
    run(team, team->product, product);
}

static void *work(void *argument) {
    const struct member *member = argument;
    struct team *team = member->team;
    pthread_mutex_lock(&team->lock); /* until the team is complete */
    pthread_mutex_unlock(&team->lock);
    for (;;) {
        wait_for_all(team);
        if (team->stop) return NULL;
        team->run(team, member->index, team->job);
        wait_for_all(team);
    }
}

/* A team of the caller and `threads` - 1 others, fewer if the system gives no more; or NULL.
 * `instructions` counts from the best set on, see above; `half` says what is stored. */
struct team *hexswarm_start(int64_t threads, int64_t instructions, int64_t half) {
    struct team *team = calloc(1, sizeof *team + (size_t)threads * sizeof *team->members);
    if (!team) return NULL;
    team->decode = best()[instructions].decode[half];
    team->head = best()[instructions].head[half];
    team->product = best()[instructions].product[half];
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->next, NULL);
    pthread_mutex_lock(&team->lock);
    for (team->threads = 1; team->threads < threads; team->threads++) {
        struct member *member = team->members + team->threads;
        *member = (struct member){.team = team, .index = team->threads};
        if (pthread_create(&member->thread, NULL, work, member)) break;
    }
    pthread_mutex_unlock(&team->lock);
    return team;
}

void hexswarm_stop(struct team *team) {
    team->stop = 1;
    wait_for_all(team);
    for (int i = 1; i < team->threads; i++) pthread_join(team->members[i].thread, NULL);
    pthread_cond_destroy(&team->next);
    pthread_mutex_destroy(&team->lock);
    free(team);
}
