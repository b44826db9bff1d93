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

/* Forward and backward over the layers for heads in one region (home < 0: in any), through labels at
 * (layer, region). */
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
                if (home < 0 || c->region[q] == home) x = c->begin[q] + c->close_in[q] + c->enter[q];
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
                x = c->finish[q] + c->close_out[q] +
                    (home < 0 ? 0 : c->close_between[c->region[q] * regions + home]);
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
