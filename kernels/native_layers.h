/* The arithmetic of native.c, compiled once per instruction set and kind of stored numbers: see
 * there for the theory. The includer sets LANES, the floats of a vector register, HALF, whether
 * matrices and the cache hold bfloat16 instead of float, and NAME(x), which makes the names of this
 * round unique. Vectors are GCC's and Clang's generic ones; there are no intrinsics.
 *
 * Sums over columns of a weight matrix go through k in ascending order, one fused multiply-add per
 * term, whatever the number of rows, the tiling and the threads. A row's result therefore does not
 * depend on its neighbours, bit for bit. */

#define vec NAME(vec)
#define ivec NAME(ivec)
#define quad NAME(quad)
#define halves NAME(halves)
#define stored NAME(stored)
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
#if HALF
typedef uint16_t stored;
#else
typedef float stored;
#endif
#define LINE (64 / (int)sizeof(stored)) /* numbers in a line of the caches */

INLINE vec NAME(load)(const float *p) { return *(const vec *)p; }
INLINE void NAME(store)(float *p, vec v) { *(vec *)p = v; }
INLINE vec NAME(all)(float value) { return (vec){0} + value; }

/* Stored numbers: a bfloat16 is the upper half of a float. It is widened on its way to the
 * registers and rounded to the nearest on its way back, to even between two. */
#if HALF
INLINE vec NAME(fetch)(const stored *p) {
    return (vec)(__builtin_convertvector(*(const halves *)p, ivec) << 16);
}
INLINE float NAME(fetch_one)(const stored *p) {
    const uint32_t bits = (uint32_t)*p << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
INLINE void NAME(keep)(stored *to, const float *from, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, from + i, sizeof bits);
        const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
        to[i] = (uint16_t)((from[i] == from[i] ? rounded : 0x7fc00000) >> 16);
    }
}
#else
INLINE vec NAME(fetch)(const stored *p) { return *(const vec *)p; }
INLINE float NAME(fetch_one)(const stored *p) { return *p; }
INLINE void NAME(keep)(stored *to, const float *from, int64_t n) {
    memcpy(to, from, (size_t)n * sizeof *to);
}
#endif

INLINE float NAME(total)(vec v) {
    quad part[LANES / 4];
    memcpy(part, &v, sizeof v);
    for (int i = 1; i < LANES / 4; i++) part[0] += part[i];
    return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}

/* exp(x), within 2 units in the last place on [-87, 88], held at the ends outside; NaN stays NaN.
 * x = n ln 2 + r; n is rounded by adding 1.5 * 2^23, which leaves it in the low bits of the sum. */
INLINE vec NAME(exp)(vec x) {
    const ivec low = x < NAME(all)(-87.0f), high = x > NAME(all)(88.0f);
    x = (vec)(((ivec)x & ~(low | high)) | ((ivec)NAME(all)(-87.0f) & low) |
              ((ivec)NAME(all)(88.0f) & high));
    const vec magic = NAME(all)(12582912.0f);
    const vec shifted = x * 1.44269504f + magic, n = shifted - magic;
    const vec r = x - n * 0.693145751953125f - n * 1.42860682e-6f;
    vec p = NAME(all)(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return (vec)((ivec)p + (((ivec)shifted - (ivec)magic) << 23));
}

/* y = x / sqrt(mean(x^2) + eps) * weight; y may be x. */
static void NAME(rms_norm)(float *y, const float *x, const float *weight, int64_t n, float eps) {
    vec squares = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) squares += NAME(load)(x + i) * NAME(load)(x + i);
    float sum = NAME(total)(squares);
    for (; i < n; i++) sum += x[i] * x[i];
    const float scale = 1.0f / __builtin_sqrtf(sum / (float)n + eps);
    for (i = 0; i + LANES <= n; i += LANES)
        NAME(store)(y + i, NAME(load)(x + i) * scale * NAME(load)(weight + i));
    for (; i < n; i++) y[i] = x[i] * scale * weight[i];
}

/* sums[r][j] += sum over u < 4 of x[r][u] * w[u][j], for V vectors of columns from j on. */
INLINE void NAME(patch)(const int R, const int V, float *sums, const float *x, const stored *w,
                        int64_t width, int64_t j) {
    vec weights[4][2];
    UNROLL for (int u = 0; u < 4; u++)
        UNROLL for (int v = 0; v < V; v++)
            weights[u][v] = NAME(fetch)(w + u * width + j + v * LANES);
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) {
            vec sum = NAME(load)(sums + r * STRIDE + j + v * LANES);
            UNROLL for (int u = 0; u < 4; u++) sum += x[r * 4 + u] * weights[u][v];
            NAME(store)(sums + r * STRIDE + j + v * LANES, sum);
        }
}

/* The same for n columns and R rows, R known to the compiler. `ahead` is what to fetch from memory
 * meanwhile, in the same shape: the hardware looks ahead within a page only. */
INLINE void NAME(strip)(const int R, float *sums, const float *from, int64_t depth, const stored *w,
                        int64_t width, int64_t n, const stored *ahead) {
    float x[8 * 4];
    int64_t j = 0;
    for (int r = 0; r < R; r++) memcpy(x + r * 4, from + r * depth, 4 * sizeof *x);
    for (; j + 2 * LANES <= n; j += 2 * LANES) {
        if (ahead)
            UNROLL for (int u = 0; u < 4; u++)
                UNROLL for (int line = 0; line < 2 * LANES; line += LINE)
                    __builtin_prefetch(ahead + u * width + j + line, 0, 3);
        NAME(patch)(R, 2, sums, x, w, width, j);
    }
    for (; j + LANES <= n; j += LANES) NAME(patch)(R, 1, sums, x, w, width, j);
    for (; j < n; j++)
        for (int r = 0; r < R; r++)
            for (int u = 0; u < 4; u++) sums[r * STRIDE + j] += x[r * 4 + u] * NAME(fetch_one)(w + u * width + j);
}

#define STRIP(R)                                                                                   \
    static void NAME(strip_##R)(float *sums, const float *x, int64_t depth, const stored *w,       \
                                int64_t width, int64_t n, const stored *ahead) {                   \
        NAME(strip)(R, sums, x, depth, w, width, n, ahead);                                        \
    }
STRIP(1) STRIP(2) STRIP(3) STRIP(4) STRIP(5) STRIP(6) STRIP(7) STRIP(8)
#undef STRIP

static void (*const NAME(strips)[])(float *, const float *, int64_t, const stored *, int64_t,
                                    int64_t, const stored *) = {
    NULL,          NAME(strip_1), NAME(strip_2), NAME(strip_3), NAME(strip_4),
    NAME(strip_5), NAME(strip_6), NAME(strip_7), NAME(strip_8),
};

/* sums[r][j] += x[r][0] * w[j]: one row of weights, for what four do not divide. */
static void NAME(thin_strip)(int rows, float *sums, const float *x, int64_t depth, const stored *w,
                             int64_t n) {
    for (int r = 0; r < rows; r++, sums += STRIDE, x += depth) {
        int64_t j = 0;
        for (; j + LANES <= n; j += LANES)
            NAME(store)(sums + j, NAME(load)(sums + j) + *x * NAME(fetch)(w + j));
        for (; j < n; j++) sums[j] += *x * NAME(fetch_one)(w + j);
    }
}

#include "native_tiles.h"

/* Columns `own` of y = x @ w + bias, or of y += x @ w + bias, for which many rows need `room`
 * `[rows, width]`; x `[rows, depth]` with rows `x_stride` apart, w `[depth, width]`, y
 * `[rows, width]`. The sums of a tile of columns stay in the first-level cache while the weights
 * stream by. */
static void NAME(multiply)(float *y, int add, float *room, const float *x, int64_t x_stride,
                           int rows, const stored *w, int64_t depth, int64_t width,
                           const float *bias, struct range own) {
    float sums[(MANY - 1) * STRIDE];
    if (rows >= MANY) {
        NAME(multiply_many)(y, add, room, x, x_stride, rows, w, depth, width, bias, own);
        return;
    }
    for (int64_t tile = own.first; tile < own.end; tile += TILE) {
        const int64_t n = MIN(TILE, own.end - tile);
        const size_t bytes = (size_t)n * sizeof *sums;
        int64_t k = 0;
        for (int r = 0; r < rows; r++) {
            if (bias)
                memcpy(sums + r * STRIDE, bias + tile, bytes);
            else
                memset(sums + r * STRIDE, 0, bytes);
        }
        for (; k + 4 <= depth; k += 4) {
            const stored *at = w + k * width + tile;
            const stored *ahead = k + 8 <= depth ? at + 4 * width : w + tile + TILE;
            for (int r = 0; r < rows; r += 8)
                NAME(strips)[MIN(8, rows - r)](sums + r * STRIDE, x + r * x_stride + k, x_stride,
                                               at, width, n, r ? NULL : ahead);
        }
        for (; k < depth; k++)
            NAME(thin_strip)(rows, sums, x + k, x_stride, w + k * width + tile, n);
        for (int r = 0; r < rows; r++) {
            float *to = y + r * width + tile;
            if (add)
                for (int64_t j = 0; j < n; j++) to[j] += sums[r * STRIDE + j];
            else
                memcpy(to, sums + r * STRIDE, bytes);
        }
    }
}

/* Norm and rotary embedding of one head, in place. The sines of the first half are negated. */
static void NAME(rotate)(float *x, const float *weight, const float *cos, const float *sin,
                         int64_t n, float eps) {
    const int64_t half = n / 2;
    if (weight) NAME(rms_norm)(x, x, weight, n, eps);
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] + b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

INLINE float NAME(dot)(const float *a, const stored *b, int64_t n) {
    vec sums = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sums += NAME(load)(a + i) * NAME(fetch)(b + i);
    float sum = NAME(total)(sums);
    for (; i < n; i++) sum += a[i] * NAME(fetch_one)(b + i);
    return sum;
}

/* Replaces scores by exp(score - top); gives their sum. `scores` has room for whole vectors. */
static float NAME(weigh)(float *scores, int count, float top) {
    float sum = 0;
    for (int i = 0; i < count; i += LANES)
        NAME(store)(scores + i, NAME(exp)(NAME(load)(scores + i) - top));
    for (int i = 0; i < count; i++) sum += scores[i];
    return sum;
}

/* out = out * keep + sum of weights[i] * values[i]. */
static void NAME(mix)(float *out, float keep, const float *weights, const stored *const *values,
                      int count, int64_t n) {
    int64_t d = 0;
    for (; d + 4 * LANES <= n; d += 4 * LANES) {
        vec sums[4];
        UNROLL for (int v = 0; v < 4; v++) sums[v] = NAME(load)(out + d + v * LANES) * keep;
        for (int i = 0; i < count; i++)
            UNROLL for (int v = 0; v < 4; v++)
                sums[v] += weights[i] * NAME(fetch)(values[i] + d + v * LANES);
        UNROLL for (int v = 0; v < 4; v++) NAME(store)(out + d + v * LANES, sums[v]);
    }
    for (; d + LANES <= n; d += LANES) {
        vec sum = NAME(load)(out + d) * keep;
        for (int i = 0; i < count; i++) sum += weights[i] * NAME(fetch)(values[i] + d);
        NAME(store)(out + d, sum);
    }
    for (; d < n; d++) {
        float sum = out[d] * keep;
        for (int i = 0; i < count; i++) sum += weights[i] * NAME(fetch_one)(values[i] + d);
        out[d] = sum;
    }
}

/* Attention of up to HEADS query heads on one KV head, for one token: keys in chunks, the softmax
 * corrected as its maximum grows. Reads no slot but those of the tokens that the query sees. Keys
 * of one head lie too far apart for the hardware's prefetcher. */
static void NAME(attend)(const struct shape *shape, const struct batch *batch, const stored *cache,
                         int64_t window, int row, int64_t kv_head, int heads, const float *q,
                         float *out) {
    const int64_t n = shape->head_dim, half = shape->kv_heads * n;
    const int64_t length = batch->positions[row] + 1;
    const int64_t *blocks = batch->blocks + batch->tables[row];
    const float scale = 1.0f / __builtin_sqrtf((float)n);
    float tops[HEADS], sums[HEADS] = {0};
    memset(out, 0, (size_t)(heads * n) * sizeof *out);
    for (int h = 0; h < heads; h++) tops[h] = -__builtin_inff();
    for (int64_t t = window && length > window ? length - window : 0; t < length; t += CHUNK) {
        const int count = (int)MIN(CHUNK, length - t);
        const stored *keys[CHUNK], *values[CHUNK];
        for (int i = 0; i < count; i++) {
            const int64_t block = (t + i) / batch->block_size, at = (t + i) % batch->block_size;
            const int64_t slot = blocks[block] * batch->block_size + at;
            keys[i] = cache + slot * 2 * half + kv_head * n;
            values[i] = keys[i] + half;
            for (int64_t d = 0; d < n; d += LINE) __builtin_prefetch(keys[i] + d, 0, 3);
        }
        for (int h = 0; h < heads; h++) {
            float scores[CHUNK] = {0}, top = tops[h], keep[LANES];
            for (int i = 0; i < count; i++) {
                if (h == 0)
                    for (int64_t d = 0; d < n; d += LINE) __builtin_prefetch(values[i] + d, 0, 3);
                scores[i] = scale * NAME(dot)(q + h * n, keys[i], n);
                if (scores[i] > top) top = scores[i];
            }
            NAME(store)(keep, NAME(exp)(NAME(all)(tops[h] - top)));
            sums[h] = sums[h] * *keep + NAME(weigh)(scores, count, top);
            NAME(mix)(out + h * n, *keep, scores, values, count, n);
            tops[h] = top;
        }
    }
    for (int h = 0; h < heads; h++)
        for (int64_t d = 0; d < n; d++) out[h * n + d] /= sums[h];
}

/* gate = silu(gate) * up, columns `own` of each half. */
static void NAME(silu_mul)(float *gate_up, int rows, int64_t width, struct range own) {
    for (int r = 0; r < rows; r++) {
        float *gate = gate_up + r * 2 * width, *up = gate + width;
        int64_t j = own.first;
        for (; j + LANES <= own.end; j += LANES) {
            const vec g = NAME(load)(gate + j);
            NAME(store)(gate + j, g / (NAME(exp)(-g) + 1.0f) * NAME(load)(up + j));
        }
        for (; j < own.end; j++) {
            float lane[LANES] = {-gate[j]};
            NAME(store)(lane, NAME(exp)(NAME(load)(lane)));
            gate[j] = gate[j] / (lane[0] + 1.0f) * up[j];
        }
    }
}

/* One thread's part of all layers. Between two waits no thread reads what another one writes. */
static void NAME(decode)(struct team *team, int thread, const void *job) {
    const struct pass *pass = job;
    const struct shape *s = pass->shape;
    const struct batch *b = pass->batch;
    const int rows = (int)b->rows, threads = team->threads;
    const int64_t hidden = s->hidden, inner = s->intermediate, n = s->head_dim;
    const int64_t rotated = s->heads + s->kv_heads, fused = (rotated + s->kv_heads) * n;
    const int64_t group = s->heads / s->kv_heads;
    float *x = pass->x, *heads = pass->scratch;
    float *attended = heads + rows * fused;
    float *gate_up = attended + rows * s->heads * n;
    float *y = gate_up + rows * 2 * inner + thread * rows * hidden;
    const struct range of_fused = columns(fused, thread, threads);
    const struct range of_hidden = columns(hidden, thread, threads);
    const struct range of_gate = columns(inner, thread, threads);
    const struct range of_up = {inner + of_gate.first, inner + of_gate.end};
    const struct range of_both = {0, 2 * inner};
    const struct range each_head = share(rows * rotated, thread, threads);
    const struct range each_group = share(rows * s->kv_heads, thread, threads);

    for (int64_t l = 0; l < pass->count; l++) {
        const struct layer *layer = pass->layers + l;
        stored *cache = layer->cache;
        for (int r = 0; r < rows; r++)
            NAME(rms_norm)(y + r * hidden, x + r * hidden, layer->input_norm, hidden, s->eps);
        NAME(multiply)(heads, 0, NULL, y, hidden, rows, layer->qkv, hidden, fused, layer->qkv_bias,
                       of_fused);
        wait_for_all(team);
        for (int64_t item = each_head.first; item < each_head.end; item++) {
            const int64_t r = item / rotated, head = item % rotated;
            float *at = heads + r * fused + head * n;
            NAME(rotate)(at, layer->qk_norm ? layer->qk_norm + head * n : NULL, b->cos + r * n,
                         b->sin + r * n, n, s->eps);
            if (head >= s->heads) {
                stored *key = cache + (b->slots[r] * 2 * s->kv_heads + head - s->heads) * n;
                NAME(keep)(key, at, n);
                NAME(keep)(key + s->kv_heads * n, at + s->kv_heads * n, n);
            }
        }
        wait_for_all(team);
        for (int64_t item = each_group.first; item < each_group.end; item++) {
            const int64_t r = item / s->kv_heads, kv_head = item % s->kv_heads;
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head += HEADS)
                NAME(attend)(s, b, cache, layer->window, (int)r, kv_head,
                             (int)MIN(HEADS, (kv_head + 1) * group - head),
                             heads + r * fused + head * n, attended + (r * s->heads + head) * n);
        }
        wait_for_all(team);
        NAME(multiply)(x, 1, y, attended, s->heads * n, rows, layer->o, s->heads * n, hidden,
                       layer->o_bias, of_hidden);
        wait_for_all(team);
        for (int r = 0; r < rows; r++)
            NAME(rms_norm)(y + r * hidden, x + r * hidden, layer->post_norm, hidden, s->eps);
        NAME(multiply)(gate_up, 0, NULL, y, hidden, rows, layer->gate_up, hidden, 2 * inner,
                       layer->gate_up_bias, threads == 1 ? of_both : of_gate);
        if (threads > 1)
            NAME(multiply)(gate_up, 0, NULL, y, hidden, rows, layer->gate_up, hidden, 2 * inner,
                           layer->gate_up_bias, of_up);
        NAME(silu_mul)(gate_up, rows, inner, of_gate);
        wait_for_all(team);
        NAME(multiply)(x, 1, y, gate_up, 2 * inner, rows, layer->down, inner, hidden,
                       layer->down_bias, of_hidden);
        wait_for_all(team);
    }
}

/* One thread's columns of the logits. */
static void NAME(head)(struct team *team, int thread, const void *job) {
    const struct head *head = job;
    const int rows = (int)head->rows;
    const int64_t hidden = head->hidden, vocabulary = head->vocabulary;
    const struct range own = columns(vocabulary, thread, team->threads);
    float *y = head->scratch + thread * rows * hidden;
    for (int r = 0; r < rows; r++)
        NAME(rms_norm)(y + r * hidden, head->x + r * hidden, head->norm, hidden, head->eps);
    NAME(multiply)(head->logits, 0, NULL, y, hidden, rows, head->weight, hidden, vocabulary, NULL,
                   own);
}

#undef vec
#undef ivec
#undef quad
#undef halves
#undef stored
#undef LINE
