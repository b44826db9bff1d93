/* The hot path of the router: shortest rings under two limits, and the choice of candidates.
 *
 * search.py tells the theory and has the same algorithm in Python, which tests compare with this one;
 * the structs below are mirrored in native.py. Nothing here calls Python: plain arrays in, plain
 * arrays out, so that the interpreter's lock need not be held.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#define MAX_STAGES 64

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
    double gap; /* relative: a ring this near to the best will do */
    int64_t most_labels;
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
    int16_t dead;
} Label;

/* What does not change while one problem is solved. */
typedef struct {
    const Problem *p;
    int32_t *holders, *from;   /* holders of layer l: holders[from[l]..from[l + 1]) */
    int64_t *block;            /* edges from holders of l - 1 to those of l begin at block[l] */
    int64_t edges, states;
    int32_t *state;            /* index of (peer, first layer of its span) in a table */
    double *t_edges, *a_edges; /* hops in the order in which the tables need them */
    double *cost_edges, cost_t, cost_a; /* their sum by the weights of the objective */
    double *mixed, *here;
    double *a_table;
    double *open_later; /* [layers + 1]: the rest of a ring opens no faster than this */
    Label *labels;
    int64_t count, room;
    int32_t *heap;
    int64_t heaped, heap_room;
    int32_t *bucket; /* [states]: newest label there */
} Search;

/* The tables of one head: least rest of the ring from entering a peer at a layer. */
typedef struct {
    double *cost, *t, *dual;
    double lambda_t, lambda_a; /* multipliers of `dual` */
} Tables;

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
    s->cost_edges = malloc((size_t)(s->edges + 1) * sizeof(double));
    s->cost_t = s->cost_a = NAN;
    s->mixed = malloc((size_t)(s->edges + 1) * sizeof(double));
    s->here = malloc((size_t)(4 * n + 1) * sizeof(double));
    s->bucket = malloc((size_t)(s->states + 1) * sizeof *s->bucket);
    if (!s->t_edges || !s->a_edges || !s->cost_edges || !s->mixed || !s->here || !s->bucket) return 0;
    for (int64_t l = 1; l < layers; l++) {
        double *t = s->t_edges + s->block[l], *a = s->a_edges + s->block[l];
        for (int i = s->from[l - 1]; i < s->from[l]; i++) {
            int64_t row = (int64_t)s->holders[i] * n;
            for (int j = s->from[l]; j < s->from[l + 1]; j++) {
                int64_t e = row + s->holders[j];
                *t++ = t_hop(p, e);
                *a++ = a_hop(p, e);
            }
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
    free(s->cost_edges);
    free(s->a_edges), free(s->mixed), free(s->here), free(s->a_table), free(s->labels);
    free(s->heap), free(s->bucket), free(s->open_later);
}

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx2", "default")))
#endif
static void add(double *sum, const double *x, double by_x, const double *y, double by_y, int64_t count) {
    for (int64_t i = 0; i < count; i++) sum[i] = by_x * x[i] + by_y * y[i];
}

/* For each of `rows` peers the least edge + rest over the `count` that may follow. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx2", "default")))
#endif
static void least(double *found, const double *edges, const double *rest, int rows, int count) {
    for (int i = 0; i < rows; i++, edges += count) {
        double low[8];
        int j = 0;
        for (int k = 0; k < 8; k++) low[k] = INFINITY;
        for (; j + 8 <= count; j += 8)
            for (int k = 0; k < 8; k++) {
                double x = edges[j + k] + rest[j + k];
                low[k] = x < low[k] ? x : low[k];
            }
        for (; j < count; j++) low[0] = edges[j] + rest[j] < low[0] ? edges[j] + rest[j] : low[0];
        for (int k = 1; k < 8; k++) low[0] = low[k] < low[0] ? low[k] : low[0];
        found[i] = low[0];
    }
}

/* Dynamic programming from the last layer to the first, with costs price x wp + t x wt + a x wa.
 * head < 0: the cheapest closing link of any head. A peer may be used twice, hence a bound. */
static void cost_to_go(Search *s, double *table, double wp, double wt, double wa, int head) {
    const Problem *p = s->p;
    int64_t n = p->peers, layers = p->layers;
    const double *edges = s->mixed;
    if (wt == 1 && wa == 0) edges = s->t_edges;
    else if (wt == 0 && wa == 1) edges = s->a_edges;
    else if (wt == p->weight_t && wa == p->weight_a) {
        edges = s->cost_edges;
        if (wt != s->cost_t || wa != s->cost_a) {
            add(s->cost_edges, s->t_edges, wt, s->a_edges, wa, s->edges);
            s->cost_t = wt, s->cost_a = wa;
        }
    } else
        add(s->mixed, s->t_edges, wt, s->a_edges, wa, s->edges);
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
                if (l + 1 < p->end[peer] && run[peer] < best) best = run[peer];
            }
            run[peer] = best + wp * p->price_layer[peer] + wt * p->t_layer[peer] + wa * p->a_layer[peer];
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
        least(found, edges + s->block[l], rest, before, count);
        for (int i = 0; i < before; i++) leave[s->holders[s->from[l - 1] + i]] = found[i];
    }
}

/* --- labels ------------------------------------------------------------------------------------- */

static int earlier(const Search *s, int32_t a, int32_t b) {
    double x = s->labels[a].bound, y = s->labels[b].bound;
    return x < y || (x == y && a < b);
}

static int push(Search *s, int32_t label) {
    if (s->heaped == s->heap_room) {
        int64_t room = s->heap_room ? 2 * s->heap_room : 1024;
        int32_t *heap = realloc(s->heap, (size_t)room * sizeof *heap);
        if (!heap) return 0;
        s->heap = heap, s->heap_room = room;
    }
    int64_t i = s->heaped++;
    for (; i > 0 && earlier(s, label, s->heap[(i - 1) / 2]); i = (i - 1) / 2)
        s->heap[i] = s->heap[(i - 1) / 2];
    s->heap[i] = label;
    return 1;
}

static int32_t pop(Search *s) {
    int32_t top = s->heap[0], last = s->heap[--s->heaped];
    int64_t i = 0;
    for (;;) {
        int64_t child = 2 * i + 1;
        if (child >= s->heaped) break;
        if (child + 1 < s->heaped && earlier(s, s->heap[child + 1], s->heap[child])) child++;
        if (!earlier(s, s->heap[child], last)) break;
        s->heap[i] = s->heap[child];
        i = child;
    }
    if (s->heaped) s->heap[i] = last;
    return top;
}

static Label *new_label(Search *s) {
    if (s->count == s->room) {
        int64_t room = s->room ? 2 * s->room : 1024;
        Label *labels = realloc(s->labels, (size_t)room * sizeof *labels);
        if (!labels) return NULL;
        s->labels = labels, s->room = room;
    }
    return s->labels + s->count++;
}

static int uses(const Search *s, int32_t label, int peer) {
    for (; label >= 0; label = s->labels[label].parent)
        if (s->labels[label].peer == peer) return 1;
    return 0;
}

/* Whatever completes `other` completes `label` too: no peer that could still be entered is used by
 * `label` alone. The peers of both are their own and those before it; `parent` of other is given. */
static int no_more_used(const Search *s, const Label *label, int32_t other_parent) {
    for (int32_t i = label->parent; i >= 0; i = s->labels[i].parent) {
        int peer = s->labels[i].peer;
        if (s->p->end[peer] > label->layer && !uses(s, other_parent, peer)) return 0;
    }
    return 1;
}

static double objective(const Problem *p, double price, double t, double a, double open, double slow) {
    return p->weight_price * price + p->weight_t * t + p->weight_a * a +
           p->weight_max * (open + p->more_chunks * slow);
}

/* With maxima m = open, n = more_chunks x slowest that the rest may raise to any height, x is no worse
 * than y in sum + w (m + n) whatever comes if it is so with neither, either and both raised. */
static int corners(double sum, double m, double n, double w) {
    return sum <= 0 && sum + w * m <= 0 && sum + w * n <= 0 && sum + w * (m + n) <= 0;
}

static int no_worse(const Problem *p, const Label *x, const Label *y) {
    double open = x->open - y->open, slow = p->more_chunks * (x->slowest - y->slowest);
    double t = x->t - y->t, a = x->a - y->a;
    if (p->limit_t < INFINITY && t > 0) return 0;
    if (p->limit_a < INFINITY && !corners(a, open, slow, 1)) return 0;
    return corners(p->weight_price * (x->price - y->price) + p->weight_t * t + p->weight_a * a, open, slow,
                   p->weight_max);
}

/* Is `new` (not yet stored) no better than a label that is there? Labels it beats are struck out. */
static int dominated(Search *s, const Label *new, int32_t bucket) {
    for (int32_t i = bucket; i >= 0; i = s->labels[i].next) {
        Label *held = s->labels + i;
        if (held->dead || held->head != new->head) continue;
        if (no_worse(s->p, held, new) && no_more_used(s, held, new->parent)) return 1;
        if (no_worse(s->p, new, held) && no_more_used(s, new, held->parent)) held->dead = 1;
    }
    return 0;
}

/* The best ring so far. */
typedef struct {
    double value, enough; /* what a bound must undercut: value less the gap */
    double price, t, a, open, slowest;
    int32_t stages, peer[MAX_STAGES], end[MAX_STAGES];
} Best;

/* Is this ring within the limits and better than the best? Then it is the best; 1 if so. */
static int improves(const Problem *p, Best *best, double price, double t, double a, double open,
                    double slow) {
    if (t > p->limit_t || a + open + p->more_chunks * slow > p->limit_a) return 0;
    double value = objective(p, price, t, a, open, slow);
    if (!(value < best->value)) return 0;
    best->value = value, best->enough = value - p->gap * fabs(value);
    best->price = price, best->t = t, best->a = a, best->open = open, best->slowest = slow;
    return 1;
}

/* The multiplier of a limit, by the slope between the route of least cost and that of least resource
 * (LARAC, Juettner et al. 2001), found on the tables alone: the true costs of those two routes are
 * followed along the tables' choices. Any multiplier gives a bound; this one gives a good one. */
typedef struct {
    double sum, t, a;
    int ok;
} Followed;

/* Follow the choices of a table from the head on; what is within the limits is a ring to beat. */
static Followed follow(const Search *s, const double *table, double wp, double wt, double wa, int head,
                       Best *best) {
    const Problem *p = s->p;
    int64_t n = p->peers;
    int32_t peers[MAX_STAGES], ends[MAX_STAGES], stages = 1;
    double price = p->price_enter[head], t = p->t_enter[head], a = p->a_begin[head] + p->a_enter[head];
    double open = p->open_stage[head], slow = 0;
    int peer = peers[0] = head, layer = 0, begin = 0;
    for (;;) {
        price += p->price_layer[peer], t += p->t_layer[peer], a += p->a_layer[peer];
        double work = (++layer - begin) * p->a_layer[peer];
        slow = work > slow ? work : slow;
        if (layer == p->layers) break;
        double least = INFINITY;
        int to = -1;
        if (layer < p->end[peer])
            least = table[at(s, peer, layer)] - wp * p->price_enter[peer] - wt * p->t_enter[peer] -
                    wa * p->a_enter[peer];
        for (int j = s->from[layer]; j < s->from[layer + 1]; j++) {
            int other = s->holders[j];
            if (other == peer || other == head) continue;
            int64_t e = (int64_t)peer * n + other;
            double cost = wt * t_hop(p, e) + wa * a_hop(p, e) + table[at(s, other, layer)];
            if (cost * (1 + 1e-12) < least) least = cost, to = other;
        }
        if (least == INFINITY || (to >= 0 && stages == MAX_STAGES)) return (Followed){0, 0, 0, 0};
        if (to < 0) continue;
        int64_t e = (int64_t)peer * n + to;
        t += t_hop(p, e) + p->t_enter[to], a += a_hop(p, e) + p->a_enter[to], price += p->price_enter[to];
        open = p->open_stage[to] > open ? p->open_stage[to] : open;
        double dial = open_hop(p, peer, e), carry = transfer(p, e);
        open = dial > open ? dial : open;
        slow = carry > slow ? carry : slow;
        ends[stages - 1] = begin = layer;
        peer = peers[stages++] = to;
    }
    ends[stages - 1] = layer;
    t += p->t_finish[peer] + closing(p, peer, head);
    a += p->a_finish[peer];
    int once = 1;
    for (int i = 0; i < stages; i++)
        for (int j = 0; j < i; j++) once &= peers[i] != peers[j];
    if (once && improves(p, best, price, t, a, open, slow)) {
        best->stages = stages;
        memcpy(best->peer, peers, sizeof peers), memcpy(best->end, ends, sizeof ends);
    }
    return (Followed){p->weight_price * price + p->weight_t * t + p->weight_a * a, t,
                      a + open + p->more_chunks * slow, 1};
}

static double excess(const Problem *p, const Followed *f, int on_t) {
    return on_t ? f->t - p->limit_t : f->a - p->limit_a;
}

/* Find multipliers for the rings of a head; `tables->dual` is free to write to until they are found. */
static void find_lambda(Search *s, Tables *tables, int head, Best *best) {
    const Problem *p = s->p;
    double wp = p->weight_price, wt = p->weight_t, wa = p->weight_a, *scratch = tables->dual;
    Followed cheap = follow(s, tables->cost, wp, wt, wa, head, best);
    if (!cheap.ok) return;
    for (int on_t = 1; on_t >= 0; on_t--) {
        Followed high = cheap;
        if (!((on_t ? p->limit_t : p->limit_a) < INFINITY && excess(p, &high, on_t) > 0)) continue;
        double *lambda = on_t ? &tables->lambda_t : &tables->lambda_a;
        cost_to_go(s, scratch, 0, on_t, !on_t, head);
        Followed low = follow(s, scratch, 0, on_t, !on_t, head, best);
        if (!low.ok) continue;
        for (int step = 0; step < 6; step++) {
            double high_r = on_t ? high.t : high.a, low_r = on_t ? low.t : low.a;
            double high_c = high.sum + (on_t ? 0 : tables->lambda_t * high.t);
            double low_c = low.sum + (on_t ? 0 : tables->lambda_t * low.t);
            if (high_r - low_r <= 1e-12) break;
            double slope = (low_c - high_c) / (high_r - low_r);
            if (!(slope > 0)) break;
            *lambda = slope;
            double mt = wt + tables->lambda_t, ma = wa + tables->lambda_a;
            cost_to_go(s, scratch, wp, mt, ma, head);
            Followed mid = follow(s, scratch, wp, mt, ma, head, best);
            if (!mid.ok) break;
            double mid_c = mid.sum + (on_t ? 0 : tables->lambda_t * mid.t);
            double mid_r = on_t ? mid.t : mid.a;
            if (mid_c + slope * mid_r >= (high_c + slope * high_r) * (1 - 1e-9)) break;
            if (excess(p, &mid, on_t) > 0) high = mid;
            else low = mid;
        }
    }
}

/* --- the search --------------------------------------------------------------------------------- */


static int bounded(const Search *s, const Tables *tables, Label *x, const Best *best) {
    const Problem *p = s->p;
    int state = at(s, x->peer, x->layer);
    double open = x->open > s->open_later[x->layer] ? x->open : s->open_later[x->layer];
    double maxima = open + p->more_chunks * x->slowest;
    if (p->limit_t < INFINITY && x->t + tables->t[state] > p->limit_t) return 0;
    if (p->limit_a < INFINITY && x->a + s->a_table[state] + maxima > p->limit_a) return 0;
    double sum = p->weight_price * x->price + p->weight_t * x->t + p->weight_a * x->a +
                 p->weight_max * maxima;
    x->bound = sum + tables->cost[state];
    if (tables->dual) {
        double dual = sum + tables->dual[state];
        if (tables->lambda_t > 0) dual += tables->lambda_t * (x->t - p->limit_t);
        if (tables->lambda_a > 0) dual += tables->lambda_a * (x->a + maxima - p->limit_a);
        if (dual > x->bound) x->bound = dual;
    }
    return x->bound < best->enough;
}

static void remember(const Search *s, Best *best, int32_t label, int32_t end) {
    int depth = s->labels[label].depth;
    best->stages = depth + 1;
    for (; label >= 0; label = s->labels[label].parent, depth--) {
        best->peer[depth] = s->labels[label].peer;
        best->end[depth] = end;
        end = s->labels[label].layer;
    }
}

/* Make all labels behind one; the most promising of them is the next to look at (-1: none), the others
 * wait in the queue. -2: no memory. */
static int32_t expand(Search *s, int32_t index, const Tables *tables, Best *best) {
    int32_t first = -1;
    const Problem *p = s->p;
    int64_t n = p->peers;
    Label from = s->labels[index]; /* a copy: the array may move */
    int peer = from.peer;
    if (from.depth + 1 >= MAX_STAGES) return -1;
    double price = from.price + p->price_enter[peer], t = from.t + p->t_enter[peer];
    double a = from.a + p->a_enter[peer];
    for (int layer = from.layer + 1; layer <= p->end[peer]; layer++) {
        price += p->price_layer[peer], t += p->t_layer[peer], a += p->a_layer[peer];
        double work = (layer - from.layer) * p->a_layer[peer];
        double slow = work > from.slowest ? work : from.slowest;
        if (layer == p->layers) {
            double end_t = t + p->t_finish[peer] + closing(p, peer, from.head);
            double end_a = a + p->a_finish[peer];
            if (improves(p, best, price, end_t, end_a, from.open, slow))
                remember(s, best, index, layer);
            continue;
        }
        for (int j = s->from[layer]; j < s->from[layer + 1]; j++) {
            int to = s->holders[j];
            int64_t e = (int64_t)peer * n + to;
            if (to == peer || to == from.head) continue;
            Label x = {0};
            x.price = price, x.t = t + t_hop(p, e), x.a = a + a_hop(p, e);
            x.open = from.open, x.slowest = slow;
            if (p->open_stage[to] > x.open) x.open = p->open_stage[to];
            double dial = open_hop(p, peer, e), carry = transfer(p, e);
            if (dial > x.open) x.open = dial;
            if (carry > x.slowest) x.slowest = carry;
            x.peer = to, x.layer = layer, x.head = from.head, x.parent = index;
            x.depth = (int16_t)(from.depth + 1);
            if (!bounded(s, tables, &x, best)) continue;
            if (uses(s, from.parent, to)) continue;
            int state = at(s, to, layer);
            if (dominated(s, &x, s->bucket[state])) continue;
            x.next = s->bucket[state];
            Label *stored = new_label(s);
            if (!stored) return -2;
            *stored = x;
            int32_t later = s->bucket[state] = (int32_t)(s->count - 1);
            if (first < 0 || x.bound < s->labels[first].bound) {
                int32_t swap = first;
                first = later, later = swap;
            }
            if (later >= 0 && !push(s, later)) return -2;
        }
    }
    return first;
}

static int make_tables(Search *s, Tables *tables, int head, Best *best) {
    const Problem *p = s->p;
    int limited = p->limit_t < INFINITY || p->limit_a < INFINITY;
    tables->cost = malloc((size_t)(3 * s->states + 1) * sizeof(double));
    if (!tables->cost) return 0;
    cost_to_go(s, tables->cost, p->weight_price, p->weight_t, p->weight_a, head);
    tables->t = tables->cost + s->states;
    if (p->limit_t < INFINITY) cost_to_go(s, tables->t, 0, 1, 0, head);
    tables->dual = tables->cost + 2 * s->states;
    if (limited) find_lambda(s, tables, head, best);
    else follow(s, tables->cost, p->weight_price, p->weight_t, p->weight_a, head, best);
    if (tables->lambda_t > 0 || tables->lambda_a > 0) {
        double wt = p->weight_t + tables->lambda_t, wa = p->weight_a + tables->lambda_a;
        cost_to_go(s, tables->dual, p->weight_price, wt, wa, head);
        follow(s, tables->dual, p->weight_price, wt, wa, head, best);
    } else
        tables->dual = NULL;
    return 1;
}

/* A label for each head, bounded without a table of its own: those are made when it comes first. */
static int push_heads(Search *s, Best *best) {
    const Problem *p = s->p;
    Tables loose = {0};
    loose.cost = malloc((size_t)(2 * s->states + 1) * sizeof(double));
    if (!loose.cost) return 0;
    loose.t = loose.cost + s->states;
    cost_to_go(s, loose.cost, p->weight_price, p->weight_t, p->weight_a, -1);
    if (p->limit_t < INFINITY) cost_to_go(s, loose.t, 0, 1, 0, -1);
    int ok = 1;
    for (int j = 0; ok && j < s->from[1]; j++) {
        int head = s->holders[j];
        Label x = {0};
        x.peer = head, x.head = head, x.parent = -1, x.next = -1;
        x.a = p->a_begin[head], x.open = p->open_stage[head];
        if (!bounded(s, &loose, &x, best)) continue;
        Label *stored = new_label(s);
        ok = stored != NULL;
        if (ok) *stored = x, ok = push(s, (int32_t)(s->count - 1));
    }
    free(loose.cost);
    return ok;
}

static void tell(const Best *best, Answer *answer) {
    answer->stages = best->stages;
    memcpy(answer->peer, best->peer, sizeof answer->peer);
    memcpy(answer->end, best->end, sizeof answer->end);
    answer->price = best->price, answer->t = best->t, answer->a = best->a;
    answer->open = best->open, answer->slowest = best->slowest;
}

static int64_t run(Search *s, const Problem *p, Answer *answer) {
    Best best = {.value = INFINITY, .enough = INFINITY};
    s->p = p, s->count = s->heaped = 0;
    for (int64_t i = 0; i < s->states; i++) s->bucket[i] = -1;
    if (p->limit_a < INFINITY && !s->a_table) {
        s->a_table = malloc((size_t)(s->states + 1) * sizeof(double));
        if (!s->a_table) return NO_MEMORY;
        cost_to_go(s, s->a_table, 0, 0, 1, -1);
    }
    Tables *tables = calloc((size_t)p->peers + 1, sizeof *tables);
    int64_t status = tables && push_heads(s, &best) ? NONE : NO_MEMORY;
    int proven = 1;
    while (status == NONE && s->heaped) {
        int32_t index = pop(s);
        Label *label = s->labels + index;
        if (label->bound >= best.enough) break;
        if (label->dead) continue;
        int head = label->head;
        if (!tables[head].cost) {
            answer->heads++;
            if (!make_tables(s, tables + head, head, &best)) status = NO_MEMORY;
            else if (bounded(s, tables + head, label, &best) && !push(s, index)) status = NO_MEMORY;
            continue;
        }
        if (s->count > p->most_labels) {
            proven = 0;
            break;
        }
        while (index >= 0) { /* dive: a good ring early makes the rest short */
            index = expand(s, index, tables + head, &best);
            if (index == -2) status = NO_MEMORY;
            if (index >= 0 && (s->labels[index].dead || s->labels[index].bound >= best.enough)) break;
        }
    }
    for (int64_t i = 0; tables && i < p->peers; i++) free(tables[i].cost);
    free(tables);
    answer->labels = s->count;
    if (status == NO_MEMORY) return status;
    if (!best.stages) return proven ? NONE : GAVE_UP;
    tell(&best, answer);
    return proven ? FOUND : FOUND_UNPROVEN;
}

/* What all searches over the same peers, spans and ways have in common; NULL: no memory. Price,
 * weights and limits may differ from one search to the next, and nothing else. */
EXPORT void *hexswarm_prepare(const Problem *problem) {
    Search *search = calloc(1, sizeof *search);
    if (search && !prepare(search, problem)) {
        release(search);
        free(search);
        return NULL;
    }
    return search;
}

EXPORT void hexswarm_search(void *prepared, const Problem *problem, Answer *answer) {
    memset(answer, 0, sizeof *answer);
    answer->status = run(prepared, problem, answer);
}

EXPORT void hexswarm_release(void *prepared) {
    if (prepared) release(prepared);
    free(prepared);
}

/* --- candidates of a large swarm: select.py ------------------------------------------------------ */

typedef struct {
    int64_t peers, layers, regions;
    const int32_t *first, *end, *region;               /* [peers] */
    const double *enter, *layer, *finish, *begin;      /* [peers] */
    const double *out, *in, *close_out, *close_in;     /* [peers]: own share of a hop, of the closing */
    const double *between, *close_between;             /* [regions][regions] */
    double *score;                                     /* [peers]: least cost of a ring through it */
} Census;

/* Forward and backward over the layers for heads in one region, through labels at (layer, region). */
static void through(const Census *c, const int32_t *from, const int32_t *holders, const int32_t *state,
                    double *forward, int home, double *now, double *gate, double *best) {
    int64_t layers = c->layers, regions = c->regions;
    for (int64_t l = 0; l < layers; l++) {
        if (l) {
            for (int r = 0; r < regions; r++) best[r] = INFINITY;
            for (int i = from[l - 1]; i < from[l]; i++) {
                int q = holders[i], r = c->region[q];
                double x = forward[state[q] + l - 1 - c->first[q]] + c->out[q];
                if (x < best[r]) best[r] = x;
            }
            for (int to = 0; to < regions; to++) {
                gate[to] = INFINITY;
                for (int r = 0; r < regions; r++) {
                    double x = best[r] + c->between[r * regions + to];
                    if (x < gate[to]) gate[to] = x;
                }
            }
        }
        for (int i = from[l]; i < from[l + 1]; i++) {
            int q = holders[i];
            double x = INFINITY;
            if (l == 0) {
                if (c->region[q] == home) x = c->begin[q] + c->close_in[q] + c->enter[q];
            } else {
                x = gate[c->region[q]] + c->in[q] + c->enter[q];
                if (l > c->first[q]) {
                    double stay = forward[state[q] + l - 1 - c->first[q]];
                    if (stay < x) x = stay;
                }
            }
            forward[state[q] + l - c->first[q]] = x + c->layer[q];
        }
    }
    for (int64_t l = layers - 1; l >= 0; l--) {
        if (l < layers - 1) {
            for (int r = 0; r < regions; r++) best[r] = INFINITY;
            for (int i = from[l + 1]; i < from[l + 2]; i++) {
                int q = holders[i], r = c->region[q];
                double x = c->in[q] + c->enter[q] + c->layer[q] + now[q];
                if (x < best[r]) best[r] = x;
            }
            for (int r = 0; r < regions; r++) {
                gate[r] = INFINITY;
                for (int to = 0; to < regions; to++) {
                    double x = best[to] + c->between[r * regions + to];
                    if (x < gate[r]) gate[r] = x;
                }
            }
        }
        for (int i = from[l]; i < from[l + 1]; i++) {
            int q = holders[i];
            double x;
            if (l == layers - 1)
                x = c->finish[q] + c->close_out[q] + c->close_between[c->region[q] * regions + home];
            else {
                x = gate[c->region[q]] + c->out[q];
                if (l + 1 < c->end[q] && c->layer[q] + now[q] < x) x = c->layer[q] + now[q];
            }
            now[q] = x;
            double whole = x + forward[state[q] + l - c->first[q]];
            if (whole < c->score[q]) c->score[q] = whole;
        }
    }
}

/* False if there is no memory. */
EXPORT int64_t hexswarm_select(const Census *c) {
    int64_t n = c->peers, layers = c->layers, states = 0, ok = 0;
    int32_t *from = calloc((size_t)layers + 2, sizeof *from);
    int32_t *state = malloc((size_t)(n + 1) * sizeof *state), *holders = NULL, *fill = NULL;
    double *forward = NULL, *now = NULL, *gate = NULL, *best = NULL;
    char *home = calloc((size_t)c->regions + 1, 1);
    if (!from || !state || !home) goto end;
    for (int64_t i = 0; i < n; i++) {
        state[i] = (int32_t)states;
        states += c->end[i] - c->first[i];
        for (int l = c->first[i]; l < c->end[i]; l++) from[l + 1]++;
        if (c->first[i] == 0) home[c->region[i]] = 1;
        c->score[i] = INFINITY;
        if (c->end[i] - c->first[i] == layers) /* alone, without a closing link */
            c->score[i] = c->begin[i] + c->enter[i] + layers * c->layer[i] + c->finish[i];
    }
    for (int64_t l = 0; l < layers; l++) from[l + 1] += from[l];
    holders = malloc((size_t)(states + 1) * sizeof *holders);
    fill = malloc((size_t)(layers + 1) * sizeof *fill);
    forward = malloc((size_t)(states + 1) * sizeof *forward);
    now = malloc((size_t)(n + 1) * sizeof *now);
    gate = malloc((size_t)(c->regions + 1) * sizeof *gate);
    best = malloc((size_t)(c->regions + 1) * sizeof *best);
    if (!holders || !fill || !forward || !now || !gate || !best) goto end;
    memcpy(fill, from, (size_t)layers * sizeof *fill);
    for (int64_t i = 0; i < n; i++)
        for (int l = c->first[i]; l < c->end[i]; l++) holders[fill[l]++] = (int32_t)i;
    for (int r = 0; r < c->regions; r++)
        if (home[r]) through(c, from, holders, state, forward, r, now, gate, best);
    ok = 1;
end:
    free(from), free(state), free(holders), free(fill), free(forward), free(now), free(gate);
    free(best), free(home);
    return ok;
}
