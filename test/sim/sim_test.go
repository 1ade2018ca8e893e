package sim

import (
	"flag"
	"os"
	"strconv"
	"testing"
	"time"
)

var (
	seed     = flag.Uint64("seed", 0, "the seed that TestSeed replays, with its log")
	restores = flag.Bool("restores", false, "let the metadata store be set back to backups too")
)

func options(seed uint64) Options {
	o := Options{Seed: seed, Nodes: 3, VolumeBytes: 24 << 20, Writers: 8, Duration: 9 * time.Second, Restores: *restores,
		AbsentAfter: time.Second}
	switch seed % 8 {
	case 5:
		o.Nodes, o.Replicas, o.ReplaceAfter = 4, 3, 2*time.Second
	case 7:
		o.Nodes = 5
	}
	return o
}

// seeds is how many seeds TestSeeds runs: FIRN_SIM_SEEDS, or a few.
func seeds(t *testing.T) int {
	if s := os.Getenv("FIRN_SIM_SEEDS"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 {
			t.Fatalf("FIRN_SIM_SEEDS=%q: want a number of seeds", s)
		}
		return n
	}
	return 4
}

func TestSeeds(t *testing.T) {
	for n := range seeds(t) {
		o := options(uint64(n + 1))
		r, err := Run(o)
		t.Log(r)
		if err != nil {
			t.Errorf("seed %d: %v\nreplay: go test ./test/sim -run TestSeed$ -seed %d -v", o.Seed, err, o.Seed)
		}
	}
}

// TestSeed replays one seed with its log; without -seed, seed 1 for a short time.
func TestSeed(t *testing.T) {
	o := options(*seed)
	if *seed != 0 {
		o.Log = os.Stderr
	} else {
		o.Seed, o.Duration = 1, 2*time.Second
	}
	r, err := Run(o)
	t.Log(r)
	if err != nil {
		t.Fatal(err)
	}
}

// The same seed gives the same run, event by event.
func TestReplay(t *testing.T) {
	for _, n := range []uint64{2, 5, 9} {
		o := options(n)
		o.Duration = 2 * time.Second
		var first Report
		for i := range 2 {
			r, err := Run(o)
			if err != nil {
				t.Fatal(err)
			}
			if i == 0 {
				first = r
			} else if r.Trace != first.Trace || r.Events != first.Events {
				t.Errorf("the same seed ran differently:\n%v\n%v", first, r)
			}
		}
	}
}
