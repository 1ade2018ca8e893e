package pebblestore_test

import (
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/index/pebblestore"
	"firn.io/firn/cluster/index/storetest"
)

// crashable is a store and the file system below it.
type crashable struct {
	*pebblestore.Store
	fs *vfs.MemFS
}

func open(t testing.TB, fs *vfs.MemFS) index.Store {
	t.Helper()
	s, err := pebblestore.Open("index", pebblestore.Options{FS: fs, MemTableBytes: 256 << 10, CacheBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	return &crashable{s, fs}
}

func TestStore(t *testing.T) {
	t.Parallel()
	storetest.Run(t, storetest.Kind{
		New: func(t testing.TB) index.Store { return open(t, vfs.NewCrashableMem()) },
		Crash: func(t testing.TB, s index.Store, choice func(int) int) index.Store {
			c := s.(*crashable)
			rng := rand.New(rand.NewPCG(uint64(choice(1<<30)), 1))
			after := c.fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: choice(100), RNG: rng})
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			return open(t, after)
		},
	})
}

// TestFailedFlush is L8: a flush that cannot write returns an error, reports
// it once, and no later one succeeds.
func TestFailedFlush(t *testing.T) {
	t.Parallel()
	var broken atomic.Bool
	fs := errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
		switch op.Kind {
		case errorfs.OpFileSync, errorfs.OpFileSyncData, errorfs.OpFileSyncTo:
			if broken.Load() && strings.HasSuffix(op.Path, ".sst") {
				return io.ErrUnexpectedEOF
			}
		}
		return nil
	}))
	reported := make(chan error, 16)
	s, err := pebblestore.Open("index", pebblestore.Options{FS: fs, Failed: func(err error) { reported <- err }})
	if err != nil {
		t.Fatal(err)
	}
	put := func(key string) {
		b := s.NewBatch()
		b.Set([]byte(key), []byte("value"))
		if err := s.Commit(b); err != nil {
			t.Fatal(err)
		}
	}
	put("a")
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	broken.Store(true)
	put("b")
	if err := s.Flush(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("a flush that cannot sync: %v", err)
	}
	broken.Store(false)
	if err := s.Flush(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("a flush after a failed one: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Logf("close: %v", err)
	}
	if n := len(reported); n != 1 {
		t.Fatalf("reported %d times", n)
	}
}

func TestSecondProcess(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, err := pebblestore.Open(dir, pebblestore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pebblestore.Open(dir, pebblestore.Options{}); err == nil {
		t.Fatal("opened twice")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
