/* Rings that tables stand for, multipliers that suit a limit, and boxes: see search.py. */

static double objective(const Problem *p, double price, double t, double a, double open, double slow) {
    return p->weight_price * price + p->weight_t * t + p->weight_a * a +
           p->weight_max * (open + p->more_chunks * slow);
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

/* Follow the choices of a table, from the head on (head < 0: from the best one);
 * what is within the limits is a ring to beat. */
static Followed follow(const Search *s, double *table, double wp, double wt, double wa, int head,
                       const Box *box, Best *best) {
    const Problem *p = s->p;
    const double *leaves = leaves_of(s, table);
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
            double x = k * each + leaves[state + k - 1];
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
 * good one. The table of the last one tried stays in `table`; 0: none was. `base` is the multiplier of t
 * that stays while that of a is found. */
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
    in->dual = new_table(s);
    if (!known) in->a = new_table(s);
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
    in->a = doubles(s, 2 * in->row * s->states), in->dual = doubles(s, 2 * in->row * s->states);
    if (!in->a || !in->dual) return 0;
    for (int b = 0; b < in->row; b++) {
        const Draft *draft = b < in->count ? kept[b] : NULL;
        in->open_low[b] = draft ? draft->box.open_low : 0, in->slow_low[b] = draft ? draft->box.slow_low : 0;
        in->open_top[b] = draft ? draft->box.open_top : -1, in->slow_top[b] = draft ? draft->box.slow_top : -1;
        in->lambda_a[b] = draft ? draft->lambda_a : 0;
        for (int64_t i = 0; i < 2 * s->states; i++) {
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
