/* The problem, what is made ready for it, and tables of least rests: see search.py. */

#define MAX_STAGES 64
#define FIRST_LABELS 300
#define BOX_STEPS 2
#define FEW_BOXES 8
#define FEW_LABELS 1000
#define FINE 0.01
#define SMALL 32
#define SLIGHT 1e-2 /* weight of t with which a closing link decides nothing */
#define MAX_BOXES 32

enum { FOUND = 0, NONE = 1, FOUND_UNPROVEN = 2, GAVE_UP = 3, NO_MEMORY = 4 };

typedef struct {
    int64_t peers, layers;
    const int32_t *first, *end;                                  /* [peers] */
    const double *price_enter, *price_layer;                     /* [peers] */
    const double *t_enter, *t_layer, *t_finish;                  /* time per token */
    const double *a_enter, *a_layer, *a_finish, *a_begin;        /* first token, the sum */
    const double *open_stage;                                    /* first token, a maximum */
    const double *rtt, *jitter, *per_byte;                       /* [from][to], the ways */
    const uint8_t *linked;                                       /* [from][to] */
    double hop_fixed, late, t_bytes, a_bytes, dial;              /* see Problem in search.py */
    double weight_price, weight_t, weight_a, weight_max, more_chunks;
    double limit_t, limit_a;
    int64_t most_labels, steps; /* of the secant for a multiplier */
    const uint8_t *barred;      /* [peers]: not to be used; NULL: none */
} Problem;

typedef struct {
    int64_t status, stages, labels, heads;
    int32_t peer[MAX_STAGES], end[MAX_STAGES];
    double price, t, a, open, slowest;
} Answer;

typedef struct {
    double bound;
    double price, t, a, open, slowest;
    int32_t peer, layer, head, parent; /* the label's peer begins at layer */
    int32_t next;                      /* of the same peer and layer */
    int16_t depth;
    int8_t dead, seen;
} Label;

/* Rings whose maxima lie within these bounds. The maxima of a ring are not sums, so no table of the
 * additive kind sees those that are still to come; but a table of the rings in one box may leave out
 * every stage and hop beyond its top, and add its bottom. The least over all boxes is a bound. */
typedef struct {
    double open_low, open_top, slow_low, slow_top;
} Box;

/* The boxes in which there may be a better ring, whatever its head; one array for each field, because
 * a label looks at all of them at once. */
typedef struct {
    double open_low[MAX_BOXES], open_top[MAX_BOXES], slow_low[MAX_BOXES], slow_top[MAX_BOXES];
    double lambda_a[MAX_BOXES], lambda_t;
    int count, row; /* `row`: the count filled up with boxes that nothing fits */
    double *a, *dual; /* [2 x states][row]: least a, least cost with the multipliers */
} Boxes;

/* The tables of one head: least rest of the ring. */
typedef struct {
    double *cost, *t;
    double *dual; /* of the cost with multipliers on the limits; NULL: there are none */
    double lambda_t, lambda_a;
} Tables;

/* Memory that is handed on from one problem to the next: fresh pages cost more than what is written. */
typedef struct Chunk {
    struct Chunk *next;
    size_t room, used;
} Chunk;

/* Rows of hops are filled up to so many, which is what a processor compares at once. */
#define WIDE 8

/* What does not change while one problem is solved. */
typedef struct {
    const Problem *p;
    int32_t *holders, *from;   /* holders of layer l: holders[from[l]..from[l + 1]) */
    int64_t *block;            /* hops from holders of l - 1 to those of l begin at block[l] */
    int64_t edges, states;
    int32_t *offset;           /* layer l of a peer is its state offset[peer] + l */
    int32_t *slot;             /* [states]: where the tables have it, in the order of holders */
    double *t_hops, *a_hops, *open_hops, *carry_hops; /* [from][to] */
    double *t_edges, *a_edges; /* [to][from] for each layer, as the tables need them */
    double *open_edges, *carry_edges; /* what each hop does to the maxima */
    double *here, *low; /* [peers]: for one table, for one label */
    int32_t *most; /* [peers]: layers of a stage in a box */
    Boxes boxes;
    int boxed;
    double *a_table; /* of any head; with boxes, theirs count */
    int any_head; /* the closing link weighs next to nothing: tables and labels of all heads are alike */
    Tables *tables; /* [peers]: of each head that came to the front */
    Tables loose;   /* of any head: decides whether a head gets tables of its own */
    double *loose_dual; /* room for its dual */
    double *open_later; /* [layers + 1]: the rest of a ring opens no faster than this */
    Chunk *chunks, *idle;
    Label *labels;
    int64_t count, room;
    int32_t *heap;
    int64_t heaped, heap_room;
    int32_t *bucket; /* [states]: newest label there */
} Search;

static double way(const Problem *p, int64_t e) {
    return p->rtt[e] / 2 + p->hop_fixed + p->late * p->jitter[e];
}

static double transfer(const Problem *p, int64_t e) { return p->a_bytes * p->per_byte[e]; }

/* The closing link costs nothing if the ring is one stage. */
static double closing(const Problem *p, int tail, int head) {
    return tail == head ? 0 : way(p, (int64_t)tail * p->peers + head);
}

/* Seconds until the stage at `from` has a link to the next one and can say so. */
static double open_hop(const Problem *p, int from, int64_t e) {
    double ask = p->rtt[e] + 2 * p->late * p->jitter[e];
    return p->open_stage[from] + (p->linked[e] ? ask : ask * p->dial);
}

static int at(const Search *s, int peer, int layer) { return s->slot[s->offset[peer] + layer]; }

#define CHUNK ((size_t)4 << 20)
#define MOST_IDLE ((size_t)64 << 20)

static _Atomic(Chunk *) left_over; /* by the problem that was released last */

/* Room for `count` things that lives as long as the problem, or until `give_back`; NULL: no memory. */
static void *take(Search *s, int64_t count, size_t size) {
    size_t bytes = ((size_t)(count + 1) * size + 63) & ~(size_t)63;
    Chunk *chunk = s->chunks;
    if (!chunk || chunk->room - chunk->used < bytes) {
        Chunk **idle = &s->idle;
        while (*idle && (*idle)->room < bytes + 64) idle = &(*idle)->next;
        chunk = *idle;
        if (chunk)
            *idle = chunk->next;
        else {
            size_t room = bytes + 64 > CHUNK ? bytes + 64 : CHUNK;
            if (!(chunk = malloc(room))) return NULL;
            chunk->room = room;
        }
        chunk->used = 64;
        chunk->next = s->chunks;
        s->chunks = chunk;
    }
    chunk->used += bytes;
    return (char *)chunk + chunk->used - bytes;
}

static double *doubles(Search *s, int64_t count) { return take(s, count, sizeof(double)); }

/* A table has the least rest from entering a peer at a layer, by slot; and behind that, by state, from
 * leaving it after that layer. */
static double *new_table(Search *s) { return doubles(s, 2 * s->states); }

static double *leaves_of(const Search *s, double *table) { return table + s->states; }

/* What was taken since `chunk` was the newest, with `used` of it taken. */
static void give_back(Search *s, Chunk *chunk, size_t used) {
    while (s->chunks != chunk) {
        Chunk *last = s->chunks;
        s->chunks = last->next;
        last->next = s->idle, s->idle = last;
    }
    if (chunk) chunk->used = used;
}

static void free_chunks(Chunk *chunk) {
    while (chunk) {
        Chunk *next = chunk->next;
        free(chunk);
        chunk = next;
    }
}

/* Who holds which layer, and where the tables have it. */
static int make_holders(Search *s) {
    const Problem *p = s->p;
    int64_t n = p->peers, layers = p->layers;
    s->from = take(s, layers + 1, sizeof *s->from);
    s->offset = take(s, n, sizeof *s->offset);
    s->block = take(s, layers + 1, sizeof *s->block);
    int32_t *fill = take(s, layers, sizeof *fill);
    if (!s->from || !s->offset || !s->block || !fill) return 0;
    memset(s->from, 0, (size_t)(layers + 2) * sizeof *s->from);
    for (int64_t i = 0; i < n; i++) {
        s->offset[i] = (int32_t)s->states - p->first[i];
        s->states += p->end[i] - p->first[i];
        for (int l = p->first[i]; l < p->end[i]; l++) s->from[l + 1]++;
    }
    for (int64_t l = 0; l < layers; l++) s->from[l + 1] += s->from[l];
    s->holders = take(s, s->states, sizeof *s->holders);
    s->slot = take(s, s->states, sizeof *s->slot);
    s->bucket = take(s, s->states, sizeof *s->bucket);
    if (!s->holders || !s->slot || !s->bucket) return 0;
    memcpy(fill, s->from, (size_t)layers * sizeof *fill);
    for (int64_t i = 0; i < n; i++)
        for (int l = p->first[i]; l < p->end[i]; l++) {
            s->slot[s->offset[i] + l] = fill[l];
            s->holders[fill[l]++] = (int32_t)i;
        }
    for (int64_t l = 1; l <= layers; l++) {
        s->block[l] = s->edges;
        int64_t rows = (s->from[l] - s->from[l - 1] + WIDE - 1) / WIDE * WIDE;
        if (l < layers) s->edges += rows * (s->from[l + 1] - s->from[l]);
    }
    return 1;
}

/* Two sizes of all hops in the order of the tables; rows are filled up with what is there. */
static void arrange(const Search *s, double *x, double *y, const double *of_x, const double *of_y) {
    int64_t n = s->p->peers;
    for (int64_t l = 1; l < s->p->layers; l++) {
        int first = s->from[l - 1], rows = s->from[l] - first;
        int next = s->from[l], count = s->from[l + 1] - next, wide = (rows + WIDE - 1) / WIDE * WIDE;
        for (int i = 0; i < wide; i++) {
            int64_t row = n * s->holders[first + (i < rows ? i : 0)];
            for (int j = 0; j < count; j++) {
                int64_t e = row + s->holders[next + j];
                x[j * wide + i] = of_x[e], y[j * wide + i] = of_y[e];
            }
        }
        x += (int64_t)wide * count, y += (int64_t)wide * count;
    }
}

/* Everything that depends on the spans. */
static int lay_out(Search *s) {
    const Problem *p = s->p;
    int64_t n = p->peers, layers = p->layers;
    s->states = s->edges = 0;
    if (!make_holders(s)) return 0;
    s->t_edges = doubles(s, s->edges), s->a_edges = doubles(s, s->edges);
    s->here = doubles(s, 7 * n + 2 * WIDE), s->low = doubles(s, n);
    s->open_later = doubles(s, layers);
    if (!s->t_edges || !s->a_edges || !s->here || !s->low || !s->open_later) return 0;
    arrange(s, s->t_edges, s->a_edges, s->t_hops, s->a_hops);
    s->open_later[layers] = 0;
    for (int64_t l = layers - 1; l >= 0; l--) {
        double low = INFINITY;
        for (int i = s->from[l]; i < s->from[l + 1]; i++) {
            double x = p->open_stage[s->holders[i]];
            low = x < low ? x : low;
        }
        s->open_later[l] = low > s->open_later[l + 1] ? low : s->open_later[l + 1];
    }
    return 1;
}

static int prepare(Search *s, const Problem *p) {
    int64_t n = p->peers;
    s->p = p;
    s->idle = atomic_exchange(&left_over, NULL);
    s->t_hops = doubles(s, n * n), s->a_hops = doubles(s, n * n);
    s->most = take(s, n, sizeof *s->most);
    if (!s->t_hops || !s->a_hops || !s->most) return 0;
    for (int64_t e = 0; e < n * n; e++) {
        double size = p->per_byte[e], x = way(p, e);
        s->t_hops[e] = x + p->t_bytes * size;
        s->a_hops[e] = x + p->a_bytes * size;
    }
    return lay_out(s);
}

static void release(Search *s) {
    give_back(s, NULL, 0);
    size_t kept = 0;
    for (Chunk **chunk = &s->idle; *chunk; chunk = &(*chunk)->next)
        if ((kept += (*chunk)->room) > MOST_IDLE) {
            free_chunks(*chunk);
            *chunk = NULL;
            break;
        }
    free_chunks(atomic_exchange(&left_over, s->idle));
}

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORS
#endif

/* For each of `rows` peers the least hop + rest over the `count` that may follow: the inner loop is
 * over peers and needs no horizontal minimum, and four that follow share one pass over what was found. */
#define LEAST(COST)                                                               \
    rows = (rows + WIDE - 1) / WIDE * WIDE;                                       \
    for (int i = 0; i < rows; i++) found[i] = INFINITY;                           \
    int j = 0;                                                                    \
    for (; j + 4 <= count; j += 4) {                                              \
        int64_t w = (int64_t)j * rows, x = w + rows, y = x + rows, z = y + rows;  \
        double at_w = rest[j], at_x = rest[j + 1], at_y = rest[j + 2], at_z = rest[j + 3]; \
        for (int i = 0; i < rows; i++) {                                          \
            double one = COST(w + i) + at_w, two = COST(x + i) + at_x;            \
            double three = COST(y + i) + at_y, four = COST(z + i) + at_z;         \
            one = two < one ? two : one;                                          \
            three = four < three ? four : three;                                  \
            one = three < one ? three : one;                                      \
            found[i] = one < found[i] ? one : found[i];                           \
        }                                                                         \
    }                                                                             \
    for (; j < count; j++) {                                                      \
        int64_t w = (int64_t)j * rows;                                            \
        double at_w = rest[j];                                                    \
        for (int i = 0; i < rows; i++) {                                          \
            double one = COST(w + i) + at_w;                                      \
            found[i] = one < found[i] ? one : found[i];                           \
        }                                                                         \
    }

VECTORS static void least_of(double *restrict found, const double *hop, const double *rest, int rows,
                             int count) {
#define COST(e) (hop[e])
    LEAST(COST)
#undef COST
}

VECTORS static void least_sum(double *restrict found, const double *t, double wt, const double *a,
                              double wa, const double *rest, int rows, int count) {
#define COST(e) (wt * t[e] + wa * a[e])
    LEAST(COST)
#undef COST
}

/* The same over the hops within a box. */
VECTORS static void least_within(double *restrict found, const double *t, double wt, const double *a,
                                 double wa, const double *open, double open_top, const double *carry,
                                 double slow_top, const double *rest, int rows, int count) {
#define COST(e)                                                   \
    ((open[e] > open_top ? INFINITY : wt * t[e] + wa * a[e]) +    \
     (carry[e] > slow_top ? INFINITY : 0))
    LEAST(COST)
#undef COST
}

/* Most layers of a stage that begins at `layer`. */
static int longest(const Problem *p, int peer, int layer, const Box *box) {
    int most = p->end[peer] - layer;
    if (box && p->a_layer[peer] > 0 && box->slow_top / p->a_layer[peer] < most)
        most = (int)(box->slow_top / p->a_layer[peer] * (1 + 1e-12));
    return most;
}

/* The best end of a ring at each peer, into `leave`: finishing there and closing to the head; head < 0:
 * to the nearest one. */
static void finish(const Search *s, double *leave, double wt, double wa, int head) {
    const Problem *p = s->p;
    for (int i = s->from[p->layers - 1], slot = 0; i < s->from[p->layers]; i++, slot++) {
        int peer = s->holders[i];
        double close = head >= 0 ? closing(p, peer, head) : INFINITY;
        for (int j = 0; head < 0 && j < s->from[1]; j++) {
            double c = closing(p, peer, s->holders[j]);
            close = c < close ? c : close;
        }
        leave[slot] = wt * (p->t_finish[peer] + close) + wa * p->a_finish[peer];
    }
}

/* Dynamic programming from the last layer to the first, with costs price x wp + t x wt + a x wa.
 * head < 0: the cheapest closing link of any head. A peer may be used twice, hence a bound. With a box,
 * only stages and hops within its top. */
static void cost_to_go(Search *s, double *table, double wp, double wt, double wa, int head,
                       const Box *box) {
    const Problem *p = s->p;
    int64_t n = p->peers, layers = p->layers;
    double *leave = s->here, *rest = leave + n + WIDE, *run = rest + n, *each = run + n;
    double *enter = each + n, *leaves = leaves_of(s, table);
    for (int64_t i = 0; i < n; i++) {
        run[i] = INFINITY;
        each[i] = wp * p->price_layer[i] + wt * p->t_layer[i] + wa * p->a_layer[i];
        enter[i] = wp * p->price_enter[i] + wt * p->t_enter[i] + wa * p->a_enter[i];
        if (p->barred && p->barred[i]) enter[i] = INFINITY;
    }
    int32_t *most = s->most;
    for (int64_t i = 0; box && i < n; i++) most[i] = longest(p, (int)i, p->first[i], box);
    finish(s, leave, wt, wa, head);
    for (int64_t l = layers - 1; l >= 0; l--) {
        int begin = s->from[l], count = s->from[l + 1] - begin;
        for (int i = 0; i < count; i++) {
            int peer = s->holders[begin + i];
            int64_t state = s->offset[peer] + l;
            double best = leave[i];
            leaves[state] = best;
            if (box && p->end[peer] - l > most[peer]) { /* look at each end of a stage that is short enough */
                best = INFINITY;
                for (int k = 1; k <= most[peer]; k++) {
                    double x = k * each[peer] + leaves[state + k - 1];
                    best = x < best ? x : best;
                }
            } else {
                best = (run[peer] < best ? run[peer] : best) + each[peer];
            }
            run[peer] = best;
            rest[i] = table[begin + i] = enter[peer] + best;
        }
        if (l == 0) return;
        /* The head is not entered again: it is closed to, and only once. */
        if (head >= 0 && l < p->end[head]) rest[at(s, head, (int)l) - begin] = INFINITY;
        int before = begin - s->from[l - 1];
        int64_t first = s->block[l];
        const double *t = s->t_edges + first, *a = s->a_edges + first;
        if (box && (box->open_top < INFINITY || box->slow_top < INFINITY))
            least_within(leave, t, wt, a, wa, s->open_edges + first, box->open_top,
                         s->carry_edges + first, box->slow_top, rest, before, count);
        else if (wt == 1 && wa == 0)
            least_of(leave, t, rest, before, count);
        else if (wt == 0 && wa == 1)
            least_of(leave, a, rest, before, count);
        else
            least_sum(leave, t, wt, a, wa, rest, before, count);
    }
}
