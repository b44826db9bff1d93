/* Labels in order of their bounds, first without boxes, then with them: see search.py. */

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
    int ok;
} Followed;

/* Follow the choices of the table that was made last, from the head on (head < 0: from the best one);
 * what is within the limits is a ring to beat. */
static Followed follow(const Search *s, const double *table, double wp, double wt, double wa, int head,
                       const Box *box, Best *best) {
    const Problem *p = s->p;
    int64_t n = p->peers;
    int32_t peers[MAX_STAGES], ends[MAX_STAGES], stages = 0;
    Followed none = {0, 0, 0, 0};
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
        int64_t state = at(s, peer, layer);
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
            double x = wt * t_hop(p, e) + wa * a_hop(p, e) + table[at(s, other, layer)];
            if (x >= least) continue;
            if (box && (transfer(p, e) > box->slow_top || open_hop(p, peer, e) > box->open_top ||
                        p->open_stage[other] > box->open_top))
                continue;
            least = x, to = other;
        }
        if (to < 0) return none;
        int64_t e = (int64_t)peer * n + to;
        double dial = open_hop(p, peer, e), carry = transfer(p, e);
        t += t_hop(p, e), a += a_hop(p, e);
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
    return (Followed){p->weight_price * price + p->weight_t * t + p->weight_a * a, t, a, 1};
}

/* The multiplier of a limit on t or on a (the sum), by the slope between the ring of least cost and
 * that of least resource (LARAC, Juettner et al. 2001). Any multiplier gives a bound, this one a good
 * one. `cheap` is the ring of least cost, `spare` room for a table; `base` is the multiplier of t
 * that stays while that of a is found. */
static double find_lambda(Search *s, double *spare, Followed cheap, int on_t, double base, double limit,
                          int head, const Box *box, Best *best) {
    const Problem *p = s->p;
    double lambda = 0;
    Followed high = cheap, low;
    if ((on_t ? high.t : high.a) <= limit) return 0;
    cost_to_go(s, spare, 0, on_t, !on_t, head, box);
    low = follow(s, spare, 0, on_t, !on_t, head, box, best);
    for (int step = 0; low.ok && step < (box ? 3 : p->steps); step++) {
        double low_r = on_t ? low.t : low.a, high_r = on_t ? high.t : high.a;
        double low_c = low.sum + base * low.t, high_c = high.sum + base * high.t;
        if (high_r - low_r <= 1e-12 || low_c <= high_c) break;
        lambda = (low_c - high_c) / (high_r - low_r);
        double wt = p->weight_t + base + (on_t ? lambda : 0), wa = p->weight_a + (on_t ? 0 : lambda);
        cost_to_go(s, spare, p->weight_price, wt, wa, head, box);
        Followed mid = follow(s, spare, p->weight_price, wt, wa, head, box, best);
        if (!mid.ok) break;
        double mid_r = on_t ? mid.t : mid.a, mid_c = mid.sum + base * mid.t;
        if (mid_c + lambda * mid_r >= (high_c + lambda * high_r) * (1 - 1e-9)) break;
        if (mid_r > limit) high = mid;
        else low = mid;
    }
    return lambda;
}

/* --- the search --------------------------------------------------------------------------------- */


/* Bound a label; 0 if no ring behind it is within the limits and better than the best. */
static int bounded(const Search *s, const Tables *tables, Label *x, const Best *best) {
    const Problem *p = s->p;
    int state = at(s, x->peer, x->layer);
    if (p->limit_t < INFINITY && x->t + tables->t[state] > p->limit_t) return 0;
    double sum = p->weight_price * x->price + p->weight_t * x->t + p->weight_a * x->a, low = INFINITY;
    double least = x->open > s->open_later[x->layer] ? x->open : s->open_later[x->layer];
    for (int b = 0; b < s->count_boxes; b++) {
        const Box *box = s->boxes + b;
        if (s->in_box.dead[b] || x->open > box->open_top || x->slowest > box->slow_top) continue;
        double open = least > box->open_low ? least : box->open_low;
        double maxima = open + p->more_chunks * (x->slowest > box->slow_low ? x->slowest : box->slow_low);
        int64_t entry = b * s->states + state;
        if (p->limit_a < INFINITY && x->a + s->a_tables[entry] + maxima > p->limit_a) continue;
        double so_far = sum + p->weight_max * maxima, bound = so_far + tables->cost[state];
        double over_t = x->t - p->limit_t, over_a = x->a + maxima - p->limit_a;
        if (tables->dual) {
            double dual = so_far + tables->dual[state];
            if (tables->lambda_t > 0) dual += tables->lambda_t * over_t;
            if (tables->lambda_a > 0) dual += tables->lambda_a * over_a;
            if (dual > bound) bound = dual;
        }
        if (s->boxed) {
            double dual = so_far + s->in_box.dual[entry];
            if (s->in_box.lambda_t > 0) dual += s->in_box.lambda_t * over_t;
            if (s->in_box.lambda_a[b] > 0) dual += s->in_box.lambda_a[b] * over_a;
            if (dual > bound) bound = dual;
        }
        if (bound < low) low = bound;
    }
    x->bound = low;
    return low < best->value;
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
    double wp = p->weight_price, wt = p->weight_t, wa = p->weight_a;
    tables->cost = malloc((size_t)(3 * s->states + 1) * sizeof(double));
    if (!tables->cost) return 0;
    tables->t = tables->cost + s->states, tables->dual = tables->t + s->states;
    cost_to_go(s, tables->cost, wp, wt, wa, head, NULL);
    Followed cheap = follow(s, tables->cost, wp, wt, wa, head, NULL, best);
    if (p->limit_t < INFINITY) {
        if (cheap.ok)
            tables->lambda_t = find_lambda(s, tables->t, cheap, 1, 0, p->limit_t, head, NULL, best);
        cost_to_go(s, tables->t, 0, 1, 0, head, NULL);
    }
    wt += tables->lambda_t;
    if (p->limit_a < INFINITY && cheap.ok) {
        if (tables->lambda_t > 0) {
            cost_to_go(s, tables->dual, wp, wt, wa, head, NULL);
            cheap = follow(s, tables->dual, wp, wt, wa, head, NULL, best);
        }
        if (cheap.ok)
            tables->lambda_a =
                find_lambda(s, tables->dual, cheap, 0, tables->lambda_t, p->limit_a, head, NULL, best);
    }
    wa += tables->lambda_a;
    if (tables->lambda_t > 0 || tables->lambda_a > 0) {
        cost_to_go(s, tables->dual, wp, wt, wa, head, NULL);
        follow(s, tables->dual, wp, wt, wa, head, NULL, best);
    } else
        tables->dual = NULL;
    return 1;
}

/* Least cost of a ring in a box, as far as its table can tell. */
static double root_bound(const Search *s, int b) {
    const Problem *p = s->p;
    const Box *box = s->boxes + b;
    double low = INFINITY;
    for (int j = 0; j < s->from[1]; j++) {
        int head = s->holders[j];
        int64_t state = b * s->states + at(s, head, 0);
        if (p->open_stage[head] > box->open_top) continue;
        double open = p->open_stage[head] > box->open_low ? p->open_stage[head] : box->open_low;
        double maxima = open + p->more_chunks * box->slow_low, a = p->a_begin[head];
        if (p->limit_a < INFINITY && a + s->a_tables[state] + maxima > p->limit_a) continue;
        double x = p->weight_a * a + p->weight_max * maxima + s->in_box.dual[state];
        if (s->in_box.lambda_t > 0) x -= s->in_box.lambda_t * p->limit_t;
        if (s->in_box.lambda_a[b] > 0) x += s->in_box.lambda_a[b] * (a + maxima - p->limit_a);
        low = x < low ? x : low;
    }
    return low;
}

/* The table of one box with the multiplier on a that suits it; `cheap` is its ring without one. */
static void refine_box(Search *s, int b, Followed cheap, Best *best) {
    const Problem *p = s->p;
    const Box *box = s->boxes + b;
    double *table = s->in_box.dual + b * s->states;
    double wp = p->weight_price, wt = p->weight_t + s->in_box.lambda_t;
    double limit = p->limit_a - box->open_low - p->more_chunks * box->slow_low;
    if (!cheap.ok || cheap.a <= limit) return;
    s->in_box.lambda_a[b] = find_lambda(s, table, cheap, 0, s->in_box.lambda_t, limit, -1, box, best);
    cost_to_go(s, table, wp, wt, p->weight_a + s->in_box.lambda_a[b], -1, box);
    follow(s, table, wp, wt, p->weight_a + s->in_box.lambda_a[b], -1, box, best);
}

static int make_box_tables(Search *s, Best *best) {
    const Problem *p = s->p;
    double roots[MAX_BOXES];
    Followed cheap[MAX_BOXES];
    free(s->in_box.dual);
    memset(&s->in_box, 0, sizeof s->in_box);
    if (!s->boxed) return 1;
    s->in_box.dual = malloc((size_t)(s->count_boxes * s->states + 1) * sizeof(double));
    if (!s->in_box.dual) return 0;
    for (int64_t i = 0; i < p->peers; i++) /* the head that came to the front last will do */
        if (s->tables[i].cost) s->in_box.lambda_t = s->tables[i].lambda_t;
    for (int b = 0; b < s->count_boxes; b++) {
        double *table = s->in_box.dual + b * s->states, wt = p->weight_t + s->in_box.lambda_t;
        cost_to_go(s, table, p->weight_price, wt, p->weight_a, -1, s->boxes + b);
        cheap[b] = follow(s, table, p->weight_price, wt, p->weight_a, -1, s->boxes + b, best);
        roots[b] = root_bound(s, b);
    }
    for (int done = 0; done < s->count_boxes; done++) {
        int b = 0; /* the most promising box: what it gives may end the others */
        for (int i = 1; i < s->count_boxes; i++)
            if (roots[i] < roots[b]) b = i;
        s->in_box.dead[b] = roots[b] >= best->value;
        if (!s->in_box.dead[b] && p->limit_a < INFINITY) {
            refine_box(s, b, cheap[b], best);
            s->in_box.dead[b] = root_bound(s, b) >= best->value;
        }
        roots[b] = INFINITY;
    }
    return 1;
}

/* Levels from `low` on, the last one open: equal steps in ratio where that makes sense. */
static void levels(double *level, int count, double low, double high) {
    if (low < high / 64) low = high / 64;
    for (int i = 0; i < count; i++) level[i] = low * pow(high / low, (i + 1.0) / count);
    level[count - 1] = INFINITY;
}

/* What each hop does to the maxima, in the order of the tables. */
static int make_maxima(Search *s) {
    const Problem *p = s->p;
    if (s->open_edges) return 1;
    s->open_edges = malloc((size_t)(s->edges + 1) * sizeof(double));
    s->carry_edges = malloc((size_t)(s->edges + 1) * sizeof(double));
    if (!s->open_edges || !s->carry_edges) return 0;
    double *open = s->open_edges, *carry = s->carry_edges;
    for (int64_t l = 1; l < p->layers; l++)
        for (int j = s->from[l]; j < s->from[l + 1]; j++)
            for (int i = s->from[l - 1]; i < s->from[l]; i++) {
                int64_t e = (int64_t)s->holders[i] * p->peers + s->holders[j];
                double asked = open_hop(p, s->holders[i], e), own = p->open_stage[s->holders[j]];
                *open++ = asked > own ? asked : own;
                *carry++ = transfer(p, e);
            }
    return 1;
}

/* Boxes, if maxima matter: between the least that any ring can have and the most that helps. */
static int make_boxes(Search *s) {
    const Problem *p = s->p;
    int weighs = p->weight_max > 0.01 * p->weight_a && p->weight_max > 1e-3;
    if (p->limit_a == INFINITY && !weighs) return 1;
    if (!make_maxima(s)) return 0;
    double open_high = 0, slow_high = 0;
    for (int64_t i = 0; i < p->peers; i++) {
        double work = (p->end[i] - p->first[i]) * p->a_layer[i];
        if (p->end[i] > p->first[i] && p->open_stage[i] > open_high) open_high = p->open_stage[i];
        if (work > slow_high) slow_high = work;
    }
    for (int64_t i = 0; i < s->edges; i++) {
        if (s->open_edges[i] > open_high) open_high = s->open_edges[i];
        if (s->carry_edges[i] > slow_high) slow_high = s->carry_edges[i];
    }
    if (p->limit_a < open_high) open_high = p->limit_a;
    if (p->limit_a < p->more_chunks * slow_high) slow_high = p->limit_a / p->more_chunks;
    double open[OPEN_LEVELS], slow[SLOW_LEVELS];
    int opens = open_high > 0 ? OPEN_LEVELS : 1;
    int slows = slow_high > 0 && p->more_chunks > 0 ? SLOW_LEVELS : 1;
    levels(open, opens, s->open_later[0], open_high > 0 ? open_high : 1);
    levels(slow, slows, 0, slow_high > 0 ? slow_high : 1);
    s->count_boxes = 0, s->boxed = 1;
    for (int i = 0; i < opens; i++)
        for (int j = 0; j < slows; j++)
            s->boxes[s->count_boxes++] =
                (Box){i ? open[i - 1] : s->open_later[0], open[i], j ? slow[j - 1] : 0, slow[j]};
    return 1;
}

/* Tables of a for any head; boxes without any ring within the limits are taken out. */
static int make_a_tables(Search *s) {
    const Problem *p = s->p;
    free(s->a_tables);
    s->a_tables = NULL;
    if (p->limit_a == INFINITY) return 1;
    s->a_tables = malloc((size_t)(s->count_boxes * s->states + 1) * sizeof(double));
    if (!s->a_tables) return 0;
    int kept = 0;
    for (int b = 0; b < s->count_boxes; b++) {
        double *table = s->a_tables + (int64_t)kept * s->states, least = INFINITY;
        cost_to_go(s, table, 0, 0, 1, -1, s->boxed ? s->boxes + b : NULL);
        for (int j = 0; j < s->from[1]; j++) {
            int head = s->holders[j];
            double x = p->a_begin[head] + table[at(s, head, 0)];
            if (p->open_stage[head] <= s->boxes[b].open_top && x < least) least = x;
        }
        if (least + s->boxes[b].open_low + p->more_chunks * s->boxes[b].slow_low > p->limit_a) continue;
        s->boxes[kept++] = s->boxes[b];
    }
    s->count_boxes = kept;
    return 1;
}

/* A label for each head, bounded without a table of its own: those are made when it comes first. */
static int push_heads(Search *s, Best *best) {
    const Problem *p = s->p;
    if (!s->loose.cost) {
        s->loose.cost = malloc((size_t)(3 * s->states + 1) * sizeof(double));
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
    if (!make_a_tables(s) || !make_box_tables(s, best)) return NO_MEMORY;
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

/* First without boxes, which is enough for most problems, then with them. */
static int64_t run(Search *s, const Problem *p, Answer *answer) {
    Best best = {.value = INFINITY};
    s->p = p;
    s->count_boxes = 1, s->boxed = 0;
    s->boxes[0] = (Box){0, INFINITY, 0, INFINITY};
    s->any_head = p->limit_t == INFINITY && p->weight_t < 1e-2 && p->peers > SMALL;
    s->tables = calloc((size_t)p->peers + 1, sizeof *s->tables);
    if (!s->tables) return NO_MEMORY;
    int64_t first = p->most_labels < FIRST_LABELS ? p->most_labels : FIRST_LABELS;
    int64_t status = look(s, &best, first, answer);
    if (status == FOUND_UNPROVEN && p->most_labels > first) {
        status = make_boxes(s) ? look(s, &best, p->most_labels, answer) : NO_MEMORY;
    }
    for (int64_t i = 0; i < p->peers; i++) free(s->tables[i].cost);
    free(s->tables), free(s->loose.cost);
    s->tables = NULL, s->loose = (Tables){0};
    if (status == NO_MEMORY) return status;
    if (!best.stages) return status == FOUND ? NONE : GAVE_UP;
    tell(&best, answer);
    return status;
}
