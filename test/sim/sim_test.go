package sim

import (
	"flag"
	"os"
	"strconv"
	"testing"
	"time"
)

var seed = flag.Uint64("seed", 0, "the seed that TestSeed replays, with its log")

func options(seed uint64) Options {
	return Options{Seed: seed, Nodes: 3, VolumeBytes: 24 << 20, Writers: 8, Duration: 12 * time.Second}
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

// TestSeed replays one seed with its log. Without -seed it runs seed 1, twice,
// and the two runs must be the same, event by event.
func TestSeed(t *testing.T) {
	o := options(*seed)
	if *seed != 0 {
		o.Log = os.Stderr
		r, err := Run(o)
		t.Log(r)
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	o.Seed, o.Duration = 1, 4*time.Second
	first, err := Run(o)
	if err != nil {
		t.Fatal(err)
	}
	second, err := Run(o)
	if err != nil {
		t.Fatal(err)
	}
	if first.Trace != second.Trace || first.Events != second.Events {
		t.Errorf("the same seed ran differently:\n%v\n%v", first, second)
	}
}
