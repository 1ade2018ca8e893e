package pebblefs_test

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/cockroachdb/pebble/v2"

	"firn.io/firn/internal/vfs"
	"firn.io/firn/internal/vfs/pebblefs"
)

// quiet keeps Pebble's log out of the test's output.
type quiet struct{}

func (quiet) Infof(string, ...any)           {}
func (quiet) Errorf(string, ...any)          {}
func (quiet) Fatalf(format string, a ...any) { panic(fmt.Sprintf(format, a...)) }

func open(t *testing.T, fs vfs.FS, dir string) *pebble.DB {
	t.Helper()
	db, err := pebble.Open(dir, &pebble.Options{FS: pebblefs.New(fs, vfs.ClassIndex), DisableWAL: true, Logger: quiet{}, MemTableSize: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	return db
}

func fill(t *testing.T, db *pebble.DB, round int) {
	t.Helper()
	for i := range 3000 {
		if err := db.Set(fmt.Appendf(nil, "key%06d", i), fmt.Appendf(nil, "round %d of %d", round, i), pebble.NoSync); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.Flush(); err != nil {
		t.Fatal(err)
	}
}

func verify(t *testing.T, db *pebble.DB, round int) {
	t.Helper()
	for i := range 3000 {
		v, c, err := db.Get(fmt.Appendf(nil, "key%06d", i))
		if err != nil || string(v) != fmt.Sprintf("round %d of %d", round, i) {
			t.Fatalf("key %d after round %d: %q, %v", i, round, v, err)
		}
		c.Close()
	}
}

func TestPebbleOverTheMachine(t *testing.T) {
	fs, dir := vfs.NewOS(), t.TempDir()+"/db"
	db := open(t, fs, dir)
	fill(t, db, 1)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	db = open(t, fs, dir)
	defer db.Close()
	verify(t, db, 1)
	if c := fs.Counts(vfs.ClassIndex); c.WrittenBytes == 0 || c.Syncs == 0 {
		t.Fatalf("traffic was not counted: %+v", c)
	}
}

func TestPebbleKeepsWhatWasFlushedThroughCrashes(t *testing.T) {
	for seed := range uint64(8) {
		r := rand.New(rand.NewPCG(seed, 1))
		fs := vfs.NewSim(0)
		for round := range 4 {
			db := open(t, fs, "/disk/index")
			if round > 0 {
				verify(t, db, round-1)
			}
			fill(t, db, round)
			after := fs.Crash(r)
			db.Close()
			fs = after
		}
	}
}
