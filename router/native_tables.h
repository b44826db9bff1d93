/* The problem, what is made ready for it, and tables of least rests: see search.py. */

#define MAX_STAGES 64
#define FIRST_LABELS 300
#define OPEN_LEVELS 7
#define SLOW_LEVELS 4
#define SMALL 32
#define MAX_BOXES (OPEN_LEVELS * SLOW_LEVELS)

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

/* The tables of one head: least rest of the ring from entering a peer at a layer. */
typedef struct {
    double *cost, *t;
    double *dual; /* of the cost with multipliers on the limits; NULL: there are none */
    double lambda_t, lambda_a;
} Tables;

/* Tables of the cost with multipliers for each box, whatever the head. */
typedef struct {
    double *dual;                /* [boxes][states] */
    double lambda_t, lambda_a[MAX_BOXES];
    char dead[MAX_BOXES];        /* no ring in the box is within the limits and better than the best */
} BoxTables;

/* What does not change while one problem is solved. */
typedef struct {
    const Problem *p;
    int32_t *holders, *from;   /* holders of layer l: holders[from[l]..from[l + 1]) */
    int64_t *block;            /* edges from holders of l - 1 to those of l begin at block[l] */
    int64_t edges, states;
    int32_t *state;            /* index of (peer, first layer of its span) in a table */
    double *t_edges, *a_edges; /* hops in the order in which the tables need them */
    double *open_edges, *carry_edges; /* what each hop does to the maxima */
    double *here, *leaves;
    Box boxes[MAX_BOXES];
    int count_boxes, boxed;
    double *a_tables; /* [boxes][states] */
    BoxTables in_box;
    int any_head; /* the closing link weighs next to nothing: tables and labels of all heads are alike */
    Tables *tables; /* [peers]: of each head that came to the front */
    Tables loose;   /* of any head: decides whether a head gets tables of its own */
    double *open_later; /* [layers + 1]: the rest of a ring opens no faster than this */
    Label *labels;
    int64_t count, room;
    int32_t *heap;
    int64_t heaped, heap_room;
    int32_t *bucket; /* [states]: newest label there */
} Search;


static double way(const Problem *p, int64_t e) {
    return p->rtt[e] / 2 + p->hop_fixed + p->late * p->jitter[e];
}

static double t_hop(const Problem *p, int64_t e) { return way(p, e) + p->t_bytes * p->per_byte[e]; }

static double a_hop(const Problem *p, int64_t e) { return way(p, e) + p->a_bytes * p->per_byte[e]; }

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

static int at(const Search *s, int peer, int layer) {
    return s->state[peer] + layer - s->p->first[peer];
}

static int prepare(Search *s, const Problem *p) {
    int64_t n = p->peers, layers = p->layers;
    s->p = p;
    s->from = calloc((size_t)layers + 2, sizeof *s->from);
    s->state = malloc((size_t)(n + 1) * sizeof *s->state);
    s->block = malloc((size_t)(layers + 2) * sizeof *s->block);
    if (!s->from || !s->state || !s->block) return 0;
    for (int64_t i = 0; i < n; i++) {
        s->state[i] = (int32_t)s->states;
        s->states += p->end[i] - p->first[i];
        for (int l = p->first[i]; l < p->end[i]; l++) s->from[l + 1]++;
    }
    for (int64_t l = 0; l < layers; l++) s->from[l + 1] += s->from[l];
    s->holders = malloc((size_t)(s->states + 1) * sizeof *s->holders);
    int32_t *fill = malloc((size_t)(layers + 1) * sizeof *fill);
    if (!s->holders || !fill) {
        free(fill);
        return 0;
    }
    memcpy(fill, s->from, (size_t)layers * sizeof *fill);
    for (int64_t i = 0; i < n; i++)
        for (int l = p->first[i]; l < p->end[i]; l++) s->holders[fill[l]++] = (int32_t)i;
    free(fill);
    s->block[0] = 0;
    for (int64_t l = 1; l <= layers; l++) {
        s->block[l] = s->edges;
        if (l < layers)
            s->edges += (int64_t)(s->from[l] - s->from[l - 1]) * (s->from[l + 1] - s->from[l]);
    }
    s->t_edges = malloc((size_t)(s->edges + 1) * sizeof(double));
    s->a_edges = malloc((size_t)(s->edges + 1) * sizeof(double));
    s->leaves = malloc((size_t)(s->states + 1) * sizeof(double));
    s->here = malloc((size_t)(4 * n + 1) * sizeof(double));
    s->bucket = malloc((size_t)(s->states + 1) * sizeof *s->bucket);
    if (!s->t_edges || !s->a_edges || !s->leaves || !s->here || !s->bucket) return 0;
    for (int64_t l = 1; l < layers; l++) {
        double *t = s->t_edges + s->block[l], *a = s->a_edges + s->block[l];
        for (int j = s->from[l]; j < s->from[l + 1]; j++)
            for (int i = s->from[l - 1]; i < s->from[l]; i++) {
                int64_t e = (int64_t)s->holders[i] * n + s->holders[j];
                double size = p->per_byte[e], x = way(p, e);
                *t++ = x + p->t_bytes * size;
                *a++ = x + p->a_bytes * size;
            }
    }
    s->open_later = malloc((size_t)(layers + 1) * sizeof(double));
    if (!s->open_later) return 0;
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

static void release(Search *s) {
    free(s->holders), free(s->from), free(s->state), free(s->block), free(s->t_edges);
    free(s->open_edges), free(s->carry_edges), free(s->leaves);
    free(s->a_edges), free(s->here), free(s->a_tables), free(s->in_box.dual), free(s->labels);
    free(s->heap), free(s->bucket), free(s->open_later);
}

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORS __attribute__((target_clones("avx2", "default")))
#else
#define VECTORS
#endif

/* For each of `rows` peers the least hop + rest over the `count` that may follow; hops are
 * [following][peer], so that the inner loop is over peers and needs no horizontal minimum. */
#define LEAST(COST)                                                  \
    for (int i = 0; i < rows; i++) found[i] = INFINITY;              \
    for (int64_t j = 0, row = 0; j < count; j++, row += rows) {      \
        double after = rest[j];                                      \
        for (int i = 0; i < rows; i++) {                             \
            double x = (COST) + after;                               \
            found[i] = x < found[i] ? x : found[i];                  \
        }                                                            \
    }

VECTORS static void least_of(double *restrict found, const double *hop, const double *rest, int rows,
                             int count) {
    LEAST(hop[row + i])
}

VECTORS static void least_sum(double *restrict found, const double *t, double wt, const double *a,
                              double wa, const double *rest, int rows, int count) {
    LEAST(wt * t[row + i] + wa * a[row + i])
}

/* The same over the hops within a box. */
VECTORS static void least_within(double *restrict found, const double *t, double wt, const double *a,
                                 double wa, const double *open, double open_top, const double *carry,
                                 double slow_top, const double *rest, int rows, int count) {
    LEAST((open[row + i] > open_top ? INFINITY : wt * t[row + i] + wa * a[row + i]) +
          (carry[row + i] > slow_top ? INFINITY : 0))
}

/* Most layers of a stage that begins at `layer`. */
static int longest(const Problem *p, int peer, int layer, const Box *box) {
    int most = p->end[peer] - layer;
    if (box && p->a_layer[peer] > 0 && box->slow_top / p->a_layer[peer] < most)
        most = (int)(box->slow_top / p->a_layer[peer] * (1 + 1e-12));
    return most;
}

/* Dynamic programming from the last layer to the first, with costs price x wp + t x wt + a x wa.
 * head < 0: the cheapest closing link of any head. A peer may be used twice, hence a bound. With a box,
 * only stages and hops within its top. */
static void cost_to_go(Search *s, double *table, double wp, double wt, double wa, int head,
                       const Box *box) {
    const Problem *p = s->p;
    int64_t n = p->peers, layers = p->layers;
    double *leave = s->here, *rest = s->here + n, *run = s->here + 2 * n;
    for (int64_t l = layers - 1; l >= 0; l--) {
        int begin = s->from[l], stop = s->from[l + 1];
        for (int i = begin; i < stop; i++) {
            int peer = s->holders[i];
            double best;
            if (l == layers - 1) {
                double close = head >= 0 ? closing(p, peer, head) : INFINITY;
                for (int j = 0; head < 0 && j < s->from[1]; j++) {
                    double c = closing(p, peer, s->holders[j]);
                    close = c < close ? c : close;
                }
                best = wt * (p->t_finish[peer] + close) + wa * p->a_finish[peer];
            } else {
                best = leave[peer];
                if (!box && l + 1 < p->end[peer] && run[peer] < best) best = run[peer];
            }
            double each = wp * p->price_layer[peer] + wt * p->t_layer[peer] + wa * p->a_layer[peer];
            int64_t state = at(s, peer, (int)l);
            s->leaves[state] = l == layers - 1 ? best : leave[peer];
            if (box) { /* no stage longer than the box allows: look at each end */
                int most = longest(p, peer, (int)l, box);
                best = INFINITY;
                for (int k = 1; k <= most; k++) {
                    double x = k * each + s->leaves[state + k - 1];
                    best = x < best ? x : best;
                }
                run[peer] = best;
            } else
                run[peer] = best + each;
            double enter = wp * p->price_enter[peer] + wt * p->t_enter[peer] + wa * p->a_enter[peer];
            table[at(s, peer, (int)l)] = enter + run[peer];
        }
        if (l == 0) return;
        int count = stop - begin;
        for (int j = 0; j < count; j++) {
            int peer = s->holders[begin + j];
            /* The head is not entered again: it is closed to, and only once. */
            rest[j] = peer == head ? INFINITY : table[at(s, peer, (int)l)];
        }
        int before = begin - s->from[l - 1];
        double *found = s->here + 3 * n;
        int64_t first = s->block[l];
        const double *t = s->t_edges + first, *a = s->a_edges + first;
        if (box)
            least_within(found, t, wt, a, wa, s->open_edges + first, box->open_top,
                         s->carry_edges + first, box->slow_top, rest, before, count);
        else if (wt == 1 && wa == 0)
            least_of(found, t, rest, before, count);
        else if (wt == 0 && wa == 1)
            least_of(found, a, rest, before, count);
        else
            least_sum(found, t, wt, a, wa, rest, before, count);
        for (int i = 0; i < before; i++) leave[s->holders[s->from[l - 1] + i]] = found[i];
    }
}
