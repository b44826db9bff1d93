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

/* Bound a label that enters its peer; 0 if no ring behind it is within the limits and better than the
 * best. With the `slot` of a leave in the tables: one that leaves it. */
static int bounded_at(const Search *s, const Tables *tables, Label *x, int64_t slot, const Best *best) {
    const Problem *p = s->p;
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
    int64_t entry = slot * s->boxes.row;
    x->bound = least_box(&s->boxes, s->boxes.a + entry, s->boxes.dual + entry, &reach);
    return x->bound < best->value;
}

static int bounded(const Search *s, const Tables *tables, Label *x, const Best *best) {
    return bounded_at(s, tables, x, at(s, x->peer, x->layer), best);
}

/* What the labels behind one have in common: bounds of those that leave its peer, without the rest. */
typedef struct {
    double cost, dual, t, a, wt, wa, dual_wt, dual_wa, limit_t, limit_a;
} Step;

/* For all that may follow at once a bound without what they do to the maxima: most need no closer look. */
VECTORS static void step_bounds(double *restrict low, const Step *restrict x, const int32_t *to,
                                const double *t_hop, const double *a_hop, const double *cost,
                                const double *dual, const double *t_rest, const double *a_rest,
                                int count) {
    for (int j = 0; j < count; j++) {
        double t = t_hop[to[j]], a = a_hop[to[j]];
        double bound = x->cost + x->wt * t + x->wa * a + cost[j];
        double other = x->dual + x->dual_wt * t + x->dual_wa * a + dual[j];
        bound = other > bound ? other : bound;
        bound = x->t + t + t_rest[j] > x->limit_t ? INFINITY : bound;
        low[j] = x->a + a + a_rest[j] > x->limit_a ? INFINITY : bound;
    }
}

/* The bounds of all that may follow a label that leaves its peer, into s->low. */
static void look_ahead(const Search *s, const Tables *tables, const Label *leave, int peer) {
    const Problem *p = s->p;
    int begin = s->from[leave->layer], count = s->from[leave->layer + 1] - begin;
    double maxima = leave->open + p->more_chunks * leave->slowest;
    double sum = p->weight_price * leave->price + p->weight_t * leave->t + p->weight_a * leave->a;
    int on_t = p->limit_t < INFINITY, on_a = p->limit_a < INFINITY;
    double fined = sum + (p->weight_max + tables->lambda_a) * maxima;
    if (on_t) fined += tables->lambda_t * (leave->t - p->limit_t);
    if (on_a) fined += tables->lambda_a * (leave->a - p->limit_a);
    Step step = {.cost = sum + p->weight_max * maxima, .dual = tables->dual ? fined : -INFINITY,
                 .t = leave->t, .a = leave->a + maxima, .wt = p->weight_t, .wa = p->weight_a,
                 .dual_wt = p->weight_t + tables->lambda_t, .dual_wa = p->weight_a + tables->lambda_a,
                 .limit_t = p->limit_t, .limit_a = p->limit_a};
    const double *cost = tables->cost + begin; /* also stands for those that are not needed */
    step_bounds(s->low, &step, s->holders + begin, s->t_hops + peer * p->peers,
                s->a_hops + peer * p->peers, cost, tables->dual ? tables->dual + begin : cost,
                on_t ? tables->t + begin : cost, on_a ? s->a_table + begin : cost, count);
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
        Label leave = {.price = price, .t = t, .a = a, .open = from.open, .slowest = slow, .layer = layer};
        if (!bounded_at(s, tables, &leave, s->states + s->offset[peer] + layer - 1, best)) continue;
        look_ahead(s, tables, &leave, peer);
        const double *low = s->low - s->from[layer];
        for (int j = s->from[layer]; j < s->from[layer + 1]; j++) {
            int to = s->holders[j];
            int64_t e = (int64_t)peer * n + to;
            if (low[j] >= best->value || to == peer || to == from.head) continue;
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

/* Those of a head, after the loose ones. Only t needs its own closing link if the cost does not weigh it,
 * and a has none. */
static int make_tables(Search *s, Tables *tables, int head, Best *best) {
    const Problem *p = s->p;
    double wp = p->weight_price, wt = p->weight_t, wa = p->weight_a;
    int own = head >= 0 && wt >= SLIGHT;
    tables->cost = own ? new_table(s) : s->loose.cost;
    tables->t = new_table(s), tables->dual = new_table(s);
    if (!tables->cost || !tables->t || !tables->dual) return 0;
    if (own) cost_to_go(s, tables->cost, wp, wt, wa, head, NULL);
    Followed cheap = follow(s, tables->cost, wp, wt, wa, head, NULL, best);
    if (own && cheap.ok && cheap.sum >= best->value) { /* of no use: no label gets past `cost` */
        memset(tables->t, 0, 2 * (size_t)s->states * sizeof(double));
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
            Followed soon = follow(s, s->a_table, 0, 0, 1, head, NULL, best);
            tables->lambda_a = find_lambda(s, tables->dual, cheap, soon, 0, tables->lambda_t, p->limit_a,
                                           p->steps, head, NULL, best, NULL);
            if (made && !(tables->lambda_a > 0)) cost_to_go(s, tables->dual, wp, wt, wa, head, NULL);
            made |= tables->lambda_a > 0;
        }
    }
    if (!made) tables->dual = NULL;
    return 1;
}

/* Least a of any head. */
static int make_a_table(Search *s) {
    if (s->p->limit_a == INFINITY || s->a_table) return 1;
    s->a_table = new_table(s);
    if (s->a_table) cost_to_go(s, s->a_table, 0, 0, 1, -1, NULL);
    return s->a_table != NULL;
}

/* Can any head keep each of the limits? */
static int in_time(const Search *s) {
    const Problem *p = s->p;
    for (int j = 0; j < s->from[1]; j++) {
        int head = s->holders[j];
        if (p->limit_t < INFINITY && s->loose.t[j] > p->limit_t) continue;
        if (p->limit_a == INFINITY) return 1;
        if (p->a_begin[head] + s->a_table[j] + p->open_stage[head] <= p->limit_a) return 1;
    }
    return 0;
}

/* A label for each head, bounded without a table of its own: those are made when it comes first. */
static int push_heads(Search *s, Best *best) {
    const Problem *p = s->p;
    if (!s->loose.cost) {
        s->loose.cost = new_table(s), s->loose.t = new_table(s), s->loose_dual = new_table(s);
        if (!s->loose.cost || !s->loose.t || !s->loose_dual) return 0;
        if (p->limit_t < INFINITY) cost_to_go(s, s->loose.t, 0, 1, 0, -1, NULL);
        if (!in_time(s)) return 1;
        cost_to_go(s, s->loose.cost, p->weight_price, p->weight_t, p->weight_a, -1, NULL);
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
    s->loose.lambda_t = tables->lambda_t, s->loose.lambda_a = tables->lambda_a;
    s->loose.dual = s->any_head ? tables->dual : s->loose_dual;
    if (s->any_head) return;
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
    s->any_head = p->limit_t == INFINITY && p->weight_t < SLIGHT && p->peers > SMALL;
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
