/* Annealing of a placement on its true flow: see placement/anneal.py, which has the moves in Python.
 *
 * A step copies the placement, makes one move, and takes it or not by Metropolis' rule. The threshold
 * is drawn first: the least cover of any layer bounds the flow, so most bad moves are refused
 * without one. The same state of the generator gives the same placement.
 */

typedef struct {
    double flow_weight, floor_weight, mean_weight; /* of flow, least cover, mean cover up to `goal` */
    double goal;
    double hot, cold; /* temperatures in the objective's unit, at the first and last step */
    int64_t steps;
    uint64_t random;  /* state of the generator, in and out */
    double worth, flow; /* of the best, out */
} Annealing;

typedef struct {
    const Placing *p;
    Annealing *a;
    double *cover;          /* [layers] */
    int32_t *first, *end;   /* the placement that is tried */
} Tried;

static uint64_t random_bits(uint64_t *state) { /* splitmix64 */
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static double random_unit(uint64_t *state) {
    return (double)(random_bits(state) >> 11) * 0x1.0p-53;
}

static int32_t random_below(uint64_t *state, int32_t n) {
    return (int32_t)(((random_bits(state) >> 32) * (uint64_t)n) >> 32);
}

/* What the covers say of a placement; *most bounds what it can be worth with its flow. */
static double anneal_cover(Tried *t, double *most) {
    const Placing *p = t->p;
    int32_t layers = (int32_t)p->layers;
    double goal = t->a->goal, least = INFINITY, sum = 0, now = 0;
    memset(t->cover, 0, (size_t)(layers + 1) * sizeof *t->cover);
    for (int32_t i = 0; i < p->units; i++) {
        if (t->end[i] <= t->first[i]) continue;
        double rate = flow_passes(p, i, t->first[i], t->end[i]);
        t->cover[t->first[i]] += rate, t->cover[t->end[i]] -= rate;
    }
    for (int32_t l = 0; l < layers; l++) {
        now += t->cover[l], t->cover[l] = now;
        least = fmin(least, now), sum += fmin(now, goal);
    }
    double said = t->a->floor_weight * least + t->a->mean_weight * sum / layers;
    *most = said + t->a->flow_weight * fmin(least + 1e-6, p->limit);
    return said;
}

/* Gives unit i the layers [first, end) as far as they exist and fit; `keep_end`: cut in front. */
static void anneal_set(Tried *t, int32_t i, int32_t first, int32_t end, int keep_end) {
    int32_t most = t->p->most[i], layers = (int32_t)t->p->layers;
    if (first < 0) first = 0;
    if (end > layers) end = layers;
    if (end - first > most) {
        if (keep_end) first = end - most;
        else end = first + most;
    }
    if (end <= first) first = end = 0;
    t->first[i] = first, t->end[i] = end;
}

/* As many layers as now, as many as fit, or any number. */
static int32_t anneal_size(Tried *t, int32_t i) {
    int32_t most = t->p->most[i], now = t->end[i] - t->first[i];
    int32_t way = random_below(&t->a->random, 4);
    if (way == 0 && now) return now;
    if (way == 1) return most;
    return 1 + random_below(&t->a->random, most);
}

static void move_beside(Tried *t) { /* to a neighbour's boundary */
    int32_t n = (int32_t)t->p->units, layers = (int32_t)t->p->layers;
    int32_t i = random_below(&t->a->random, n), j = random_below(&t->a->random, n);
    int32_t k = anneal_size(t, i), way = random_below(&t->a->random, 5);
    int32_t first = t->first[j], end = t->end[j];
    if (way == 0 && end < layers) anneal_set(t, i, end, end + k, 0);
    else if (way == 1 && first > 0) anneal_set(t, i, first - k, first, 1);
    else if (way == 2) anneal_set(t, i, end - k, end, 1);
    else if (way == 3) anneal_set(t, i, first, end, 0);
    else anneal_set(t, i, first, first + k, 0);
}

static void move_to_floor(Tried *t) { /* over a layer that is covered least */
    int32_t n = (int32_t)t->p->units, layers = (int32_t)t->p->layers;
    int32_t i = random_below(&t->a->random, n), k = anneal_size(t, i);
    int32_t from = random_below(&t->a->random, layers), at = from;
    for (int32_t step = 1; step < layers; step++) {
        int32_t l = (from + step) % layers;
        if (t->cover[l] < t->cover[at] - 1e-9) at = l;
    }
    int32_t first = at - random_below(&t->a->random, k);
    anneal_set(t, i, first, first + k, 0);
}

static int32_t anneal_boundary(Tried *t) {
    int32_t i = random_below(&t->a->random, (int32_t)t->p->units);
    return random_below(&t->a->random, 2) ? t->first[i] : t->end[i];
}

static int32_t anneal_shift(Tried *t) {
    int32_t far = 1 + (random_below(&t->a->random, 4) == 0);
    return random_below(&t->a->random, 2) ? far : -far;
}

static void move_boundary(Tried *t) { /* all that end or begin there */
    int32_t b = anneal_boundary(t), d = anneal_shift(t);
    if (b <= 0 || b >= t->p->layers) return;
    for (int32_t i = 0; i < t->p->units; i++) {
        if (t->end[i] <= t->first[i]) continue;
        if (t->end[i] == b) anneal_set(t, i, t->first[i], b + d, 1);
        else if (t->first[i] == b) anneal_set(t, i, b + d, t->end[i], 0);
    }
}

static void move_suffix(Tried *t) { /* all boundaries from there on, but the last layer's */
    int32_t b = anneal_boundary(t), d = anneal_shift(t), layers = (int32_t)t->p->layers;
    if (b <= 0 || b >= layers) return;
    for (int32_t i = 0; i < t->p->units; i++) {
        int32_t first = t->first[i], end = t->end[i];
        if (end < b || end <= first) continue;
        anneal_set(t, i, first >= b ? first + d : first, end < layers ? end + d : end, end == layers);
    }
}

static void move_swap(Tried *t) {
    int32_t n = (int32_t)t->p->units;
    int32_t i = random_below(&t->a->random, n), j = random_below(&t->a->random, n);
    int32_t first = t->first[i], end = t->end[i], late = random_below(&t->a->random, 2);
    anneal_set(t, i, t->first[j], t->end[j], late);
    anneal_set(t, j, first, end, late);
}

static void move_slide(Tried *t) { /* or resize */
    int32_t i = random_below(&t->a->random, (int32_t)t->p->units), d = anneal_shift(t);
    int32_t way = random_below(&t->a->random, 3);
    if (t->end[i] <= t->first[i]) return;
    anneal_set(t, i, t->first[i] + (way != 1 ? d : 0), t->end[i] + (way != 0 ? d : 0), way == 1);
}

static void anneal_move(Tried *t) {
    int32_t pick = random_below(&t->a->random, 64);
    if (pick < 20) move_beside(t);
    else if (pick < 28) move_to_floor(t);
    else if (pick < 36) move_boundary(t);
    else if (pick < 46) move_swap(t);
    else if (pick < 58) move_slide(t);
    else if (pick < 62) move_suffix(t);
    else {
        int32_t i = random_below(&t->a->random, (int32_t)t->p->units);
        t->first[i] = t->end[i] = 0;
    }
}

/* Goes on from the placement in first and end; the best so far, worth a->worth (-INFINITY: none yet),
 * is in best_first and best_end. `room` has place for two numbers a unit. */
static void anneal_walk(Net *g, Annealing *a, int32_t *first, int32_t *end, int32_t *best_first,
                        int32_t *best_end, int32_t *room, double *cover) {
    size_t n = (size_t)g->p->units, bytes = n * sizeof *first;
    Tried t = {g->p, a, cover, room, room + n};
    double most, heat = a->hot, cool = pow(a->cold / a->hot, 1.0 / (double)a->steps);
    memcpy(t.first, first, bytes), memcpy(t.end, end, bytes);
    double flow = flow_value(g, first, end);
    double held = anneal_cover(&t, &most) + a->flow_weight * flow;
    for (int64_t step = 0;; step++, heat *= cool) {
        if (held > a->worth + 1e-9) {
            a->worth = held, a->flow = flow;
            memcpy(best_first, first, bytes), memcpy(best_end, end, bytes);
        }
        if (step == a->steps) return;
        double least = held + heat * log(random_unit(&a->random) + 1e-300), worth = 0, now = 0;
        anneal_move(&t);
        int taken = 0;
        double said = anneal_cover(&t, &most);
        if (most >= least) {
            now = flow_value(g, t.first, t.end);
            worth = said + a->flow_weight * now;
            taken = worth >= least;
        }
        if (taken) {
            memcpy(first, t.first, bytes), memcpy(end, t.end, bytes);
            held = worth, flow = now;
        } else {
            memcpy(t.first, first, bytes), memcpy(t.end, end, bytes);
        }
    }
}

static int anneal(Net *g, Annealing *a, int32_t *first, int32_t *end, int32_t *best_first,
                  int32_t *best_end) {
    int32_t *room = malloc((2 * (size_t)g->p->units + 1) * sizeof *room);
    double *cover = malloc(((size_t)g->p->layers + 1) * sizeof *cover);
    int ok = room && cover;
    if (ok && a->steps > 0) anneal_walk(g, a, first, end, best_first, best_end, room, cover);
    free(room), free(cover);
    return ok;
}
