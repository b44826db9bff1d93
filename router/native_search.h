/* Labels in order of their bounds, first without boxes, then with them: see search.py. */

static int earlier(const Search *s, int32_t a, int32_t b) {
    double x = s->labels[a].bound, y = s->labels[b].bound;
    return x < y || (x == y && a < b);
}

static int push(Search *s, int32_t label) {
    if (s->heaped == s->heap_room) {
        int64_t room = s->heap_room ? 2 * s->heap_room : 1024;
        int32_t *heap = take(s, room, sizeof *heap);
        if (!heap) return 0;
        if (s->heaped) memcpy(heap, s->heap, (size_t)s->heaped * sizeof *heap);
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
        Label *labels = take(s, room, sizeof *labels);
        if (!labels) return NULL;
        if (s->count) memcpy(labels, s->labels, (size_t)s->count * sizeof *labels);
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
        if (held->dead || (held->head != new->head && !s->any_head)) continue;
        if (no_worse(s->p, held, new) && no_more_used(s, held, new->parent)) return 1;
        if (no_worse(s->p, new, held) && no_more_used(s, new, held->parent)) held->dead = 1;
    }
    return 0;
}

/* The best ring so far. */
typedef struct {
    double value; /* what a bound must undercut */
    double price, t, a, open, slowest;
    int32_t stages, peer[MAX_STAGES], end[MAX_STAGES];
} Best;

/* Is this ring within the limits and better than the best? Then it is the best; 1 if so. */
static int improves(const Problem *p, Best *best, double price, double t, double a, double open,
                    double slow) {
    if (t > p->limit_t || a + open + p->more_chunks * slow > p->limit_a) return 0;
    double value = objective(p, price, t, a, open, slow);
    if (!(value < best->value)) return 0;
    best->value = value;
    best->price = price, best->t = t, best->a = a, best->open = open, best->slowest = slow;
    return 1;
}

typedef struct {
    double sum, t, a; /* the cost without maxima; a without maxima */
    double open, slow;
    int ok;
} Followed;

/* Follow the choices of the table that was made last, from the head on (head < 0: from the best one);
 * what is within the limits is a ring to beat. */
static Followed follow(const Search *s, const double *table, double wp, double wt, double wa, int head,
                       const Box *box, Best *best) {
    const Problem *p = s->p;
    int64_t n = p->peers;
    int32_t peers[MAX_STAGES], ends[MAX_STAGES], stages = 0;
    Followed none = {0};
    int own = head;
    double least = INFINITY;
    for (int j = 0; head < 0 && j < s->from[1]; j++) {
        int other = s->holders[j];
        double x = wa * p->a_begin[other] + table[at(s, other, 0)];
        if ((!box || p->open_stage[other] <= box->open_top) && x < least) least = x, own = other;
    }
    if (own < 0) return none;
    double price = 0, t = 0, a = p->a_begin[own], open = p->open_stage[own], slow = 0;
    for (int peer = own, layer = 0;;) {
        double each = wp * p->price_layer[peer] + wt * p->t_layer[peer] + wa * p->a_layer[peer];
        int64_t state = s->offset[peer] + layer;
        int most = longest(p, peer, layer, box), length = 0;
        least = INFINITY;
        for (int k = 1; k <= most; k++) {
            double x = k * each + s->leaves[state + k - 1];
            if (x <= least * (1 + 1e-12)) least = x, length = k;
        }
        if (!length || stages == MAX_STAGES) return none;
        price += p->price_enter[peer] + length * p->price_layer[peer];
        t += p->t_enter[peer] + length * p->t_layer[peer];
        a += p->a_enter[peer] + length * p->a_layer[peer];
        slow = length * p->a_layer[peer] > slow ? length * p->a_layer[peer] : slow;
        layer += length;
        peers[stages] = peer, ends[stages++] = layer;
        if (layer == p->layers) break;
        int to = -1;
        least = INFINITY;
        for (int j = s->from[layer]; j < s->from[layer + 1]; j++) {
            int other = s->holders[j];
            int64_t e = (int64_t)peer * n + other;
            if (other == peer || other == own) continue;
            double x = wt * s->t_hops[e] + wa * s->a_hops[e] + table[j];
            if (x >= least) continue;
            if (box && (transfer(p, e) > box->slow_top || open_hop(p, peer, e) > box->open_top ||
                        p->open_stage[other] > box->open_top))
                continue;
            least = x, to = other;
        }
        if (to < 0) return none;
        int64_t e = (int64_t)peer * n + to;
        double dial = open_hop(p, peer, e), carry = transfer(p, e);
        t += s->t_hops[e], a += s->a_hops[e];
        open = dial > open ? dial : open;
        open = p->open_stage[to] > open ? p->open_stage[to] : open;
        slow = carry > slow ? carry : slow;
        peer = to;
    }
    t += p->t_finish[peers[stages - 1]] + closing(p, peers[stages - 1], own);
    a += p->a_finish[peers[stages - 1]];
    int once = 1;
    for (int i = 0; i < stages; i++)
        for (int j = 0; j < i; j++) once &= peers[i] != peers[j];
    if (once && improves(p, best, price, t, a, open, slow)) {
        best->stages = stages;
        memcpy(best->peer, peers, sizeof peers), memcpy(best->end, ends, sizeof ends);
    }
    return (Followed){p->weight_price * price + p->weight_t * t + p->weight_a * a, t, a, open, slow, 1};
}

/* The multiplier of a limit on t or on a (the sum), by the slope between the ring of least cost and
 * that of least resource (LARAC, Juettner et al. 2001). Any multiplier gives a bound, this one a
 * good one. The table of the last one tried stays in `table`; 0: none was. `base` is the multiplier of t that stays while that of a is found. */
static double find_lambda(Search *s, double *table, Followed high, Followed low, int on_t, double base,
                          double limit, int64_t steps, int head, const Box *box,
                          Best *best, Followed *ring) {
    const Problem *p = s->p;
    double lambda = 0;
    for (int64_t step = 0; high.ok && low.ok && step < steps; step++) {
        double low_r = on_t ? low.t : low.a, high_r = on_t ? high.t : high.a;
        double low_c = low.sum + base * low.t, high_c = high.sum + base * high.t;
        if (high_r - low_r <= 1e-12 || low_c <= high_c) break;
        lambda = (low_c - high_c) / (high_r - low_r);
        double wt = p->weight_t + base + (on_t ? lambda : 0), wa = p->weight_a + (on_t ? 0 : lambda);
        cost_to_go(s, table, p->weight_price, wt, wa, head, box);
        Followed mid = follow(s, table, p->weight_price, wt, wa, head, box, best);
        if (ring) *ring = mid;
        if (!mid.ok) break;
        double mid_r = on_t ? mid.t : mid.a, mid_c = mid.sum + base * mid.t;
        double value = mid_c + lambda * (mid_r - limit) - (base > 0 ? base * p->limit_t : 0);
        if (value >= best->value) break; /* nothing here can be better */
        if (mid_c + lambda * mid_r >= (high_c + lambda * high_r) * (1 - 1e-9)) break;
        if (mid_r > limit) high = mid;
        else low = mid;
    }
    return lambda;
}

/* --- the search --------------------------------------------------------------------------------- */


/* A label with what it has in common for all boxes. */
typedef struct {
    double a, open, slowest, least_open; /* `least_open`: no rest opens faster */
    double cost, dual, in_box;           /* bounds without maxima: by the tables of the head, of a box */
    double over_a;                       /* a beyond the limit, without maxima */
    double head_max, weight_max, more_chunks, limit_a;
} Reach;

/* Least bound over all boxes; rows of boxes are filled up, so there is no rest to treat apart. */
VECTORS static double least_box(const Boxes *in, const double *a, const double *dual, const Reach *x) {
    double bound[MAX_BOXES], low = INFINITY;
    int row = in->row / WIDE * WIDE;
    double own_open = x->open, own_slow = x->slowest, least = x->least_open, more = x->more_chunks;
    double sum = x->a, limit = x->limit_a, over = x->over_a, weight = x->weight_max;
    double cost = x->cost, head = x->dual, base = x->in_box, head_max = x->head_max;
    for (int b = 0; b < row; b++) {
        double open = in->open_low[b] > least ? in->open_low[b] : least;
        double slow = in->slow_low[b] > own_slow ? in->slow_low[b] : own_slow;
        double maxima = open + more * slow;
        double first = cost + weight * maxima, second = head + head_max * maxima;
        double third = base + weight * maxima + dual[b] + in->lambda_a[b] * (over + maxima);
        first = second > first ? second : first;
        first = third > first ? third : first;
        first = own_open > in->open_top[b] ? INFINITY : first;
        first = own_slow > in->slow_top[b] ? INFINITY : first;
        bound[b] = sum + a[b] + maxima > limit ? INFINITY : first;
    }
    for (int b = 0; b < row; b++) low = bound[b] < low ? bound[b] : low;
    return low;
}

/* Bound a label; 0 if no ring behind it is within the limits and better than the best. */
static int bounded(const Search *s, const Tables *tables, Label *x, const Best *best) {
    const Problem *p = s->p;
    int slot = at(s, x->peer, x->layer);
    if (p->limit_t < INFINITY && x->t + tables->t[slot] > p->limit_t) return 0;
    double least = x->open > s->open_later[x->layer] ? x->open : s->open_later[x->layer];
    double maxima = least + p->more_chunks * x->slowest;
    if (p->limit_a < INFINITY && x->a + s->a_table[slot] + maxima > p->limit_a) return 0;
    double sum = p->weight_price * x->price + p->weight_t * x->t + p->weight_a * x->a;
    double over_t = p->limit_t < INFINITY ? x->t - p->limit_t : 0;
    double over_a = p->limit_a < INFINITY ? x->a - p->limit_a : 0;
    double cost = sum + tables->cost[slot], dual = -INFINITY, head_max = p->weight_max;
    if (tables->dual) {
        dual = sum + tables->dual[slot] + tables->lambda_t * over_t + tables->lambda_a * over_a;
        head_max += tables->lambda_a;
    }
    double bound = cost + p->weight_max * maxima, other = dual + head_max * maxima;
    x->bound = other > bound ? other : bound;
    if (x->bound >= best->value) return 0;
    if (!s->boxed) return 1;
    Reach reach = {.a = x->a, .open = x->open, .slowest = x->slowest, .least_open = least,
                   .cost = cost, .dual = dual, .in_box = sum + s->boxes.lambda_t * over_t,
                   .over_a = over_a, .head_max = head_max, .weight_max = p->weight_max,
                   .more_chunks = p->more_chunks, .limit_a = p->limit_a};
    int64_t entry = (int64_t)slot * s->boxes.row;
    x->bound = least_box(&s->boxes, s->boxes.a + entry, s->boxes.dual + entry, &reach);
    return x->bound < best->value;
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
    double a = from.a + p->a_enter[peer], wt = p->weight_t, wa = p->weight_a;
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
        double here = p->weight_price * price + wt * t + wa * a;
        for (int j = s->from[layer]; j < s->from[layer + 1]; j++) {
            int to = s->holders[j];
            int64_t e = (int64_t)peer * n + to;
            double sum = here + wt * s->t_hops[e] + wa * s->a_hops[e];
            if (sum + tables->cost[j] >= best->value || to == peer || to == from.head) continue;
            Label x = {0};
            x.price = price, x.t = t + s->t_hops[e], x.a = a + s->a_hops[e];
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
    double wp = p->weight_price, wt = p->weight_t, wa = p->weight_a;
    tables->cost = doubles(s, 3 * s->states);
    if (!tables->cost) return 0;
    tables->t = tables->cost + s->states, tables->dual = tables->t + s->states;
    cost_to_go(s, tables->cost, wp, wt, wa, head, NULL);
    Followed cheap = follow(s, tables->cost, wp, wt, wa, head, NULL, best);
    if (head >= 0 && cheap.ok && cheap.sum >= best->value) { /* of no use: no label gets past `cost` */
        memset(tables->t, 0, (size_t)s->states * sizeof(double));
        tables->dual = NULL;
        return 1;
    }
    if (p->limit_t < INFINITY) {
        cost_to_go(s, tables->t, 0, 1, 0, head, NULL);
        Followed quick = follow(s, tables->t, 0, 1, 0, head, NULL, best);
        if (cheap.ok && cheap.t > p->limit_t)
            tables->lambda_t = find_lambda(s, tables->dual, cheap, quick, 1, 0, p->limit_t, p->steps,
                                           head, NULL, best, NULL);
    }
    wt += tables->lambda_t;
    int made = tables->lambda_t > 0;
    if (p->limit_a < INFINITY && cheap.ok) {
        if (made) cheap = follow(s, tables->dual, wp, wt, wa, head, NULL, best);
        if (cheap.ok && cheap.a > p->limit_a) {
            cost_to_go(s, tables->dual, 0, 0, 1, head, NULL);
            Followed soon = follow(s, tables->dual, 0, 0, 1, head, NULL, best);
            tables->lambda_a = find_lambda(s, tables->dual, cheap, soon, 0, tables->lambda_t, p->limit_a,
                                           p->steps, head, NULL, best, NULL);
            if (made && !(tables->lambda_a > 0)) cost_to_go(s, tables->dual, wp, wt, wa, head, NULL);
            made |= tables->lambda_a > 0;
        }
    }
    if (!made) tables->dual = NULL;
    return 1;
}

/* A box while boxes are cut. */
typedef struct {
    Box box;
    double *a, *dual; /* [states] */
    double lambda_a, root;
    Followed soon, cheap, ring; /* of least a, of least cost, and by the table with the multiplier */
    int dead, whole; /* `whole`: to cut it would not help */
} Draft;

/* Least cost of a ring in a box, as far as its table can tell. */
static double root_bound(const Search *s, const Draft *in) {
    const Problem *p = s->p;
    const Box *box = &in->box;
    double low = INFINITY, lambda_t = s->boxes.lambda_t;
    for (int j = 0; j < s->from[1]; j++) {
        int head = s->holders[j];
        if (p->open_stage[head] > box->open_top) continue;
        double open = p->open_stage[head] > box->open_low ? p->open_stage[head] : box->open_low;
        double maxima = open + p->more_chunks * box->slow_low, a = p->a_begin[head];
        if (p->limit_a < INFINITY && a + in->a[j] + maxima > p->limit_a) continue;
        double x = p->weight_a * a + p->weight_max * maxima + in->dual[j];
        if (lambda_t > 0) x -= lambda_t * p->limit_t;
        if (in->lambda_a > 0) x += in->lambda_a * (a + maxima - p->limit_a);
        low = x < low ? x : low;
    }
    return low;
}

/* Make the tables of a box for `lambda`. */
static Followed tabulate(Search *s, Draft *in, double lambda, Best *best) {
    const Problem *p = s->p;
    double wt = p->weight_t + s->boxes.lambda_t, wa = p->weight_a + lambda;
    in->lambda_a = lambda;
    cost_to_go(s, in->dual, p->weight_price, wt, wa, -1, &in->box);
    return follow(s, in->dual, p->weight_price, wt, wa, -1, &in->box, best);
}

static int fits(const Box *box, const Followed *ring) {
    return ring->ok && ring->open <= box->open_top && ring->slow <= box->slow_top;
}

/* The tables of a box with new tops. Least a is as before if its ring is still in the box. */
static int draft(Search *s, Draft *in, Best *best) {
    int known = in->a && fits(&in->box, &in->soon);
    in->dual = doubles(s, s->states);
    if (!known) in->a = doubles(s, s->states);
    if (!in->a || !in->dual) return 0;
    if (!known && s->p->limit_a < INFINITY) {
        cost_to_go(s, in->a, 0, 0, 1, -1, &in->box);
        in->soon = follow(s, in->a, 0, 0, 1, -1, &in->box, best);
    }
    in->ring = tabulate(s, in, in->lambda_a, best);
    if (in->lambda_a == 0) in->cheap = in->ring;
    double root = root_bound(s, in);
    if (root > in->root) in->root = root;
    return 1;
}

/* Find the multiplier that suits the bottom of a box, if it needs one; the rings that bracket it may be
 * of a larger box. */
static void refine(Search *s, Draft *in, Best *best) {
    const Problem *p = s->p;
    double limit = p->limit_a - in->box.open_low - p->more_chunks * in->box.slow_low;
    double root = root_bound(s, in);
    if (root > in->root) in->root = root;
    if (in->root >= best->value || !in->ring.ok || p->limit_a == INFINITY) return;
    Followed high = in->ring, low = in->soon;
    if (in->ring.a <= limit) {
        if (in->lambda_a == 0) return;
        high = in->cheap, low = in->ring;
    }
    double lambda = find_lambda(s, in->dual, high, low, 0, s->boxes.lambda_t, limit, BOX_STEPS, -1,
                                &in->box, best, &in->ring);
    if (lambda > 0) in->lambda_a = lambda;
    root = root_bound(s, in);
    if (root > in->root) in->root = root;
}

/* Keep what a label needs of the boxes that are alive. */
static int pack(Search *s, const Draft *drafts, int count) {
    Boxes *in = &s->boxes;
    in->count = 0;
    const Draft *kept[MAX_BOXES];
    for (int b = 0; b < count; b++)
        if (!drafts[b].dead) kept[in->count++] = drafts + b;
    in->row = (in->count + WIDE - 1) / WIDE * WIDE;
    in->a = doubles(s, in->row * s->states), in->dual = doubles(s, in->row * s->states);
    if (!in->a || !in->dual) return 0;
    for (int b = 0; b < in->row; b++) {
        const Draft *draft = b < in->count ? kept[b] : NULL;
        in->open_low[b] = draft ? draft->box.open_low : 0, in->slow_low[b] = draft ? draft->box.slow_low : 0;
        in->open_top[b] = draft ? draft->box.open_top : -1, in->slow_top[b] = draft ? draft->box.slow_top : -1;
        in->lambda_a[b] = draft ? draft->lambda_a : 0;
        for (int64_t i = 0; i < s->states; i++) {
            in->a[i * in->row + b] = draft && s->p->limit_a < INFINITY ? draft->a[i] : 0;
            in->dual[i * in->row + b] = draft ? draft->dual[i] : 0;
        }
    }
    return 1;
}

/* What each hop does to the maxima, in the order of the tables. */
static int make_maxima(Search *s) {
    const Problem *p = s->p;
    if (s->open_edges) return 1;
    int64_t n = p->peers;
    s->open_hops = doubles(s, n * n), s->carry_hops = doubles(s, n * n);
    s->open_edges = doubles(s, s->edges), s->carry_edges = doubles(s, s->edges);
    if (!s->open_hops || !s->carry_hops || !s->open_edges || !s->carry_edges) return 0;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++) {
            double asked = open_hop(p, (int)i, i * n + j), own = p->open_stage[j];
            s->open_hops[i * n + j] = asked > own ? asked : own;
            s->carry_hops[i * n + j] = transfer(p, i * n + j);
        }
    arrange(s, s->open_edges, s->carry_edges, s->open_hops, s->carry_hops);
    return 1;
}

/* Cut a box between its bottom and where its ring is: the upper part has its tables from it. */
static int cut_box(Search *s, Draft *in, Draft *upper, Best *best) {
    const Problem *p = s->p;
    double open = in->ring.open - in->box.open_low, slow = in->ring.slow - in->box.slow_low;
    double least = FINE * (p->limit_a < INFINITY ? p->limit_a : best->a + best->open);
    in->whole = !in->ring.ok || (open <= least && p->more_chunks * slow <= least);
    upper->dead = in->whole;
    if (in->whole) return 1;
    *upper = *in;
    if (open > p->more_chunks * slow)
        in->box.open_top = upper->box.open_low = in->box.open_low + open / 2;
    else
        in->box.slow_top = upper->box.slow_low = in->box.slow_low + slow / 2;
    if (!draft(s, in, best)) return 0;
    refine(s, in, best);
    refine(s, upper, best);
    return 1;
}

/* Cut boxes until there are `most`: again and again the one of least bound in two. What they give on the
 * way may end others, or the search. */
static int make_boxes(Search *s, Draft *drafts, int *count, int most, Best *best) {
    if (!*count) {
        if (!make_maxima(s)) return 0;
        s->boxed = *count = 1;
        drafts[0] = (Draft){.box = {s->open_later[0], INFINITY, 0, INFINITY}};
        if (!draft(s, drafts, best)) return 0;
        refine(s, drafts, best);
    }
    while (*count < most) {
        Draft *in = NULL;
        for (int b = 0; b < *count; b++) {
            drafts[b].dead |= drafts[b].root >= best->value;
            if (!drafts[b].dead && !drafts[b].whole && (!in || drafts[b].root < in->root))
                in = drafts + b;
        }
        if (!in) break;
        if (!cut_box(s, in, drafts + *count, best)) return 0;
        *count += !drafts[*count].dead;
    }
    for (int b = 0; b < *count; b++) drafts[b].dead |= drafts[b].root >= best->value;
    return pack(s, drafts, *count);
}

/* Least a of any head. */
static int make_a_table(Search *s) {
    if (s->p->limit_a == INFINITY || s->a_table) return 1;
    s->a_table = doubles(s, s->states);
    if (s->a_table) cost_to_go(s, s->a_table, 0, 0, 1, -1, NULL);
    return s->a_table != NULL;
}

/* A label for each head, bounded without a table of its own: those are made when it comes first. */
static int push_heads(Search *s, Best *best) {
    const Problem *p = s->p;
    if (!s->loose.cost) {
        s->loose.cost = doubles(s, 3 * s->states);
        if (!s->loose.cost) return 0;
        s->loose.t = s->loose.cost + s->states;
        cost_to_go(s, s->loose.cost, p->weight_price, p->weight_t, p->weight_a, -1, NULL);
        if (p->limit_t < INFINITY) cost_to_go(s, s->loose.t, 0, 1, 0, -1, NULL);
    }
    for (int j = 0; j < s->from[1]; j++) {
        int head = s->holders[j];
        Label x = {0};
        x.peer = head, x.head = head, x.parent = -1, x.next = -1;
        x.a = p->a_begin[head], x.open = p->open_stage[head];
        if (!bounded(s, &s->loose, &x, best)) continue;
        Label *stored = new_label(s);
        if (!stored) return 0;
        *stored = x;
        if (!push(s, (int32_t)(s->count - 1))) return 0;
    }
    return 1;
}

/* The multipliers that suit one head bound the rings of the others too. */
static void tighten_loose(Search *s, const Tables *tables) {
    const Problem *p = s->p;
    if (s->loose.dual || !tables->dual) return;
    s->loose.dual = s->loose.t + s->states;
    s->loose.lambda_t = tables->lambda_t, s->loose.lambda_a = tables->lambda_a;
    cost_to_go(s, s->loose.dual, p->weight_price, p->weight_t + tables->lambda_t,
               p->weight_a + tables->lambda_a, -1, NULL);
}

static void tell(const Best *best, Answer *answer) {
    answer->stages = best->stages;
    memcpy(answer->peer, best->peer, sizeof answer->peer);
    memcpy(answer->end, best->end, sizeof answer->end);
    answer->price = best->price, answer->t = best->t, answer->a = best->a;
    answer->open = best->open, answer->slowest = best->slowest;
}

/* One pass; `best` may hold a ring to beat already. */
static int64_t look(Search *s, Best *best, int64_t most_labels, Answer *answer) {
    s->count = s->heaped = 0;
    for (int64_t i = 0; i < s->states; i++) s->bucket[i] = -1;
    int64_t status = push_heads(s, best) ? FOUND : NO_MEMORY;
    while (status == FOUND && s->heaped) {
        int32_t index = pop(s);
        Label *label = s->labels + index;
        if (label->bound >= best->value) break;
        if (label->dead) continue;
        Tables *tables = s->tables + (s->any_head ? 0 : label->head);
        if (!label->depth && !label->seen) { /* bounded as any head may be: now as this one */
            label->seen = 1;
            if (!tables->cost && !bounded(s, &s->loose, label, best)) continue;
            answer->heads += !tables->cost;
            if (!tables->cost && !make_tables(s, tables, s->any_head ? -1 : label->head, best))
                status = NO_MEMORY;
            else if (bounded(s, tables, s->labels + index, best) && !push(s, index))
                status = NO_MEMORY;
            tighten_loose(s, tables);
            continue;
        }
        if (s->count > most_labels) status = FOUND_UNPROVEN;
        while (status == FOUND && index >= 0) { /* dive: a good ring early makes the rest short */
            index = expand(s, index, tables, best);
            if (index == -2) status = NO_MEMORY;
            if (index >= 0 && (s->labels[index].dead || s->labels[index].bound >= best->value)) break;
        }
    }
    answer->labels += s->count;
    return status;
}

/* What is left when the first labels did not settle it. */
static int64_t look_again(Search *s, Best *best, int64_t most_labels, Answer *answer) {
    s->boxes.lambda_t = s->loose.lambda_t;
    const Problem *p = s->p;
    int weighs = p->weight_max > 0.01 * p->weight_a && p->weight_max > 1e-3, count = 0;
    if (p->limit_a == INFINITY && !weighs) return look(s, best, most_labels, answer);
    Draft drafts[MAX_BOXES];
    if (!make_boxes(s, drafts, &count, FEW_BOXES, best)) return NO_MEMORY;
    int64_t few = most_labels < FEW_LABELS ? most_labels : FEW_LABELS;
    int64_t status = look(s, best, few, answer);
    if (status != FOUND_UNPROVEN || most_labels <= few) return status;
    if (!make_boxes(s, drafts, &count, MAX_BOXES, best)) return NO_MEMORY;
    return look(s, best, most_labels, answer);
}

/* First without boxes, which is enough for most problems, then with them. */
static int64_t run(Search *s, const Problem *p, Answer *answer) {
    Best best = {.value = INFINITY};
    size_t used = s->chunks->used;
    s->p = p;
    s->boxed = 0;
    s->any_head = p->limit_t == INFINITY && p->weight_t < 1e-2 && p->peers > SMALL;
    s->loose = (Tables){0};
    s->a_table = NULL, s->labels = NULL, s->heap = NULL, s->room = s->heap_room = 0;
    Search before = *s;
    s->tables = take(s, p->peers, sizeof *s->tables);
    if (!s->tables || !make_a_table(s)) return NO_MEMORY;
    memset(s->tables, 0, (size_t)p->peers * sizeof *s->tables);
    int64_t first = p->most_labels < FIRST_LABELS ? p->most_labels : FIRST_LABELS;
    int64_t status = look(s, &best, first, answer);
    if (status == FOUND_UNPROVEN && p->most_labels > first)
        status = look_again(s, &best, p->most_labels, answer);
    give_back(s, before.chunks, used);
    before.idle = s->idle;
    *s = before;
    if (status == NO_MEMORY) return status;
    if (!best.stages) return status == FOUND ? NONE : GAVE_UP;
    tell(&best, answer);
    return status;
}
