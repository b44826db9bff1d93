/* Candidates of a large swarm: see select.py. */

typedef struct {
    int64_t peers, layers, regions;
    const int32_t *first, *end, *region;               /* [peers] */
    const double *enter, *layer, *finish, *begin;      /* [peers] */
    const double *out, *in, *close_out, *close_in;     /* [peers]: own share of a hop, of the closing */
    const double *between, *close_between;             /* [regions][regions] */
    const uint8_t *homes;                              /* [regions]: look for heads there */
    int64_t anywhere;                                  /* or wherever they are, closed for nothing */
    double *score;                                     /* [peers]: least cost of a ring through it */
} Census;

/* For each region the least of `best` and the way there: from it to the others, or from them to it. */
static void through_gates(const Census *c, const double *best, double *gate, int onward) {
    int64_t regions = c->regions;
    for (int one = 0; one < regions; one++) gate[one] = INFINITY;
    for (int from = 0; from < regions; from++)
        for (int to = 0; to < regions; to++) {
            double x = best[onward ? from : to] + c->between[from * regions + to];
            double *least = gate + (onward ? to : from);
            *least = x < *least ? x : *least;
        }
}

/* Forward and backward over the layers for heads in one region (home < 0: in any), through labels at
 * (layer, region). `forward` is in the order of holders, `now` and `come` (in + enter) by peer. */
static void through(const Census *c, const int32_t *from, const int32_t *holders, const double *come,
                    double *forward, int home, double *now, double *gate, double *best) {
    int64_t layers = c->layers, regions = c->regions;
    for (int64_t l = 0; l < layers; l++) {
        if (l) through_gates(c, best, gate, 1);
        for (int r = 0; r < regions; r++) best[r] = INFINITY;
        for (int i = from[l]; i < from[l + 1]; i++) {
            int q = holders[i], r = c->region[q];
            double x = INFINITY;
            if (l)
                x = gate[r] + come[q];
            else if (home < 0 || r == home)
                x = c->begin[q] + c->close_in[q] + c->enter[q];
            if (l > c->first[q] && now[q] < x) x = now[q];
            x += c->layer[q];
            forward[i] = now[q] = x;
            x += c->out[q];
            best[r] = x < best[r] ? x : best[r];
        }
    }
    for (int64_t l = layers - 1; l >= 0; l--) {
        if (l < layers - 1) through_gates(c, best, gate, 0);
        for (int r = 0; r < regions; r++) best[r] = INFINITY;
        for (int i = from[l]; i < from[l + 1]; i++) {
            int q = holders[i], r = c->region[q];
            double x;
            if (l == layers - 1)
                x = c->finish[q] + c->close_out[q] +
                    (home < 0 ? 0 : c->close_between[r * regions + home]);
            else {
                x = gate[r] + c->out[q];
                if (l + 1 < c->end[q] && now[q] < x) x = now[q];
            }
            double whole = x + forward[i];
            if (whole < c->score[q]) c->score[q] = whole;
            now[q] = x += c->layer[q]; /* with this layer, for the one before */
            x += come[q];
            best[r] = x < best[r] ? x : best[r];
        }
    }
}
