package index_test

import (
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/index/memstore"
	"firn.io/firn/cluster/index/pebblestore"
	"firn.io/firn/cluster/seglog"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/vfs"
	"firn.io/firn/internal/vfs/pebblefs"
)

// What TestCrashAtEveryCall promises: fewer fail it.
const (
	indexSubsets = 8 // of the sectors in flight, per call
	// indexThinned is every how many calls the power is cut in the short run.
	indexThinned      = 3
	indexCrashesShort = 1400
	indexCrashesLong  = indexCrashesShort * indexThinned
)

// indexStep is a step of a script: a command, or work on the store.
type indexStep int

const (
	stepWrite indexStep = iota
	stepWriteMany
	stepOverwrite
	stepTrim
	stepCheckpoint
	stepFlush
	stepReap
)

// indexScripts are workloads of one replica over Pebble on a simulated disk.
var indexScripts = map[string][]indexStep{
	"one checkpoint": {stepWriteMany, stepCheckpoint, stepFlush, stepWriteMany},
	"flush after flush": {stepWrite, stepCheckpoint, stepFlush, stepWrite, stepCheckpoint, stepFlush, stepWrite, stepCheckpoint, stepFlush,
		stepWrite, stepCheckpoint, stepFlush, stepWrite, stepCheckpoint, stepFlush, stepWrite, stepCheckpoint, stepFlush},
	"checkpoints without a flush":   {stepWriteMany, stepCheckpoint, stepWriteMany, stepCheckpoint, stepOverwrite, stepCheckpoint, stepFlush, stepOverwrite, stepCheckpoint},
	"overwritten":                   {stepWriteMany, stepCheckpoint, stepFlush, stepOverwrite, stepCheckpoint, stepFlush, stepOverwrite, stepOverwrite, stepCheckpoint, stepFlush},
	"trimmed and reaped":            {stepWriteMany, stepCheckpoint, stepFlush, stepTrim, stepCheckpoint, stepFlush, stepReap, stepFlush, stepWriteMany, stepReap, stepCheckpoint, stepFlush},
	"trimmed, written, not flushed": {stepWriteMany, stepCheckpoint, stepFlush, stepTrim, stepWriteMany, stepCheckpoint, stepReap, stepOverwrite, stepCheckpoint},
}

// scriptedEntry is an entry of the log: what a replay applies.
type scriptedEntry struct {
	cmd wire.Command
	at  seglog.Location
}

// indexRun is a script on its way.
type indexRun struct {
	t    *testing.T
	g    *group
	rnd  *rand.Rand
	log  []scriptedEntry // entry i has index firstIndex+1+i
	sums []uint64        // digests after entry i
	// durable is the applied index of the last checkpoint that a flush has made durable.
	durable, saved atomic.Uint64
}

func (x *indexRun) command(cmd wire.Command) {
	x.t.Helper()
	x.log = append(x.log, scriptedEntry{cmd, x.g.at})
	x.g.want(wire.OutcomeApplied, cmd)
	sum, err := x.g.r.Digest()
	if err != nil {
		x.t.Fatal(err)
	}
	x.sums = append(x.sums, sum)
}

func (x *indexRun) step(s indexStep) {
	x.t.Helper()
	put := func(n int, within int) {
		for range n {
			cmd := x.g.next(write(1, 0, 0, block.Index(x.rnd.IntN(within))))
			cmd.Chunk = block.Chunk(x.rnd.IntN(3))
			x.command(cmd)
		}
	}
	switch s {
	case stepWrite:
		put(2, 200)
	case stepWriteMany:
		put(30, 200)
	case stepOverwrite:
		put(20, 20)
	case stepTrim:
		x.command(x.g.next(wire.Command{Type: wire.CmdMark, Chunk: 1, ToChunk: 2}))
	case stepCheckpoint:
		at, _ := x.g.r.Applied()
		x.g.checkpoint()
		x.saved.Store(at)
	case stepFlush:
		saved := x.saved.Load()
		x.g.flush()
		x.durable.Store(saved)
	case stepReap:
		if j := x.g.r.StartReap(100); j != nil {
			x.g.do(j)
		}
	}
}

// run does the whole script over a store.
func (x *indexRun) run(steps []indexStep, store index.Store) {
	x.t.Helper()
	x.g = newGroup(x.t, store)
	x.checkpointNew()
	x.command(fence(1, 1))
	for _, s := range steps {
		x.step(s)
	}
}

// checkpointNew makes the new replica durable, as a node does before it tells anyone.
func (x *indexRun) checkpointNew() {
	x.step(stepCheckpoint)
	x.step(stepFlush)
}

// verify opens what a crash left, compares it with what the script had at that
// index, and applies the rest of the log.
//
// While the store is made for the first time, a crash may leave one that does
// not open: it has held nothing, and a node makes it anew (born is false).
func verifyCrash(t *testing.T, fs *vfs.Sim, born bool, durable uint64, log []scriptedEntry, sums []uint64) {
	open := func() (*pebblestore.Store, error) {
		return pebblestore.Open("/index", pebblestore.Options{FS: pebblefs.New(fs, vfs.ClassIndex), MemTableBytes: 64 << 10, CacheBytes: 1 << 20})
	}
	store, err := open()
	if err != nil && !born {
		if err := fs.RemoveAll("/index"); err != nil {
			t.Fatal(err)
		}
		if err := fs.MkdirAll("/index"); err != nil {
			t.Fatal(err)
		}
		store, err = open()
	}
	if err != nil {
		t.Fatalf("open after a crash: %v", err)
	}
	db, err := index.Open(store, index.Options{})
	if err != nil {
		t.Fatalf("open after a crash: %v", err)
	}
	if db.Replica(key) == nil && durable > 0 {
		t.Fatalf("the replica is gone, it was durable at %d", durable)
	}
	if r := db.Replica(key); r != nil {
		at, _ := r.Applied()
		if at < durable {
			t.Fatalf("came back at %d, %d was durable", at, durable)
		}
		check := func() {
			sum, err := r.Digest()
			at, _ := r.Applied()
			if err != nil || at > firstIndex && sum != sums[at-firstIndex-1] {
				t.Fatalf("at %d: digest %x, %v; it was %x", at, sum, err, sums[at-firstIndex-1])
			}
			if err := db.CheckLive(false); err != nil {
				t.Fatalf("at %d: %v", at, err)
			}
		}
		check()
		for i := at - firstIndex; i < uint64(len(log)); i++ {
			cmd := log[i].cmd
			cmd.Volume = vol
			if _, err := r.Apply(firstIndex+1+i, firstTerm, &cmd, log[i].at); err != nil {
				t.Fatal(err)
			}
		}
		check()
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestCrashAtEveryCall cuts the power at each call that changes the disk below
// Pebble, and opens what is left of several subsets of the sectors in flight:
// nothing durable is missing, what is there is the state at its index, and the
// log leads from it to where the script ended.
func TestCrashAtEveryCall(t *testing.T) {
	step, promised := indexThinned, int64(indexCrashesShort)
	if os.Getenv("FIRN_TEST_LONG") != "" {
		step, promised = 1, indexCrashesLong
	}
	var calls, crashes atomic.Int64
	t.Run("scripts", func(t *testing.T) {
		for name, steps := range indexScripts {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				whole := &indexRun{t: t, rnd: rand.New(rand.NewPCG(1, 2))}
				whole.run(steps, memstore.New())

				disk := vfs.NewSim(0)
				if err := disk.MkdirAll("/index"); err != nil {
					t.Fatal(err)
				}
				x := &indexRun{t: t, rnd: rand.New(rand.NewPCG(1, 2))}
				var born atomic.Bool
				tap := &tappedFS{FS: disk, before: func(n int) {
					calls.Add(1)
					if n%step != 0 {
						return
					}
					durable := x.durable.Load() // before the cut: it may only rise
					for seed := range uint64(indexSubsets) {
						verifyCrash(t, disk.Crash(rand.New(rand.NewPCG(seed, uint64(n)))), born.Load(), durable, whole.log, whole.sums)
						crashes.Add(1)
					}
				}}
				store, err := pebblestore.Open("/index", pebblestore.Options{FS: pebblefs.New(tap, vfs.ClassIndex), MemTableBytes: 64 << 10, CacheBytes: 1 << 20})
				if err != nil {
					t.Fatal(err)
				}
				born.Store(true)
				x.run(steps, store)
				if err := x.g.db.Close(); err != nil {
					t.Fatal(err)
				}
				if err := store.Close(); err != nil {
					t.Fatal(err)
				}
			})
		}
	})
	t.Logf("measured: %d scripts of the index, %d calls that change its disk, power cut at every %d. call with %d subsets of sectors each: %d crashes",
		len(indexScripts), calls.Load(), step, indexSubsets, crashes.Load())
	if crashes.Load() < promised {
		t.Errorf("promised are %d crashes", promised)
	}
}

// tappedFS calls before with a rising number before each call that changes
// anything, one at a time.
type tappedFS struct {
	vfs.FS
	mu     sync.Mutex
	n      int
	before func(n int)
}

func (f *tappedFS) tap() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.before(f.n)
	f.n++
}

func (f *tappedFS) Open(name string, flags vfs.Flags, c vfs.Class) (vfs.File, error) {
	if flags&(vfs.Create|vfs.Truncate) != 0 {
		f.tap()
	}
	file, err := f.FS.Open(name, flags, c)
	if err != nil {
		return nil, err
	}
	return tappedFile{file, f}, nil
}

func (f *tappedFS) Remove(name string) error    { f.tap(); return f.FS.Remove(name) }
func (f *tappedFS) RemoveAll(name string) error { f.tap(); return f.FS.RemoveAll(name) }
func (f *tappedFS) Rename(from, to string) error {
	f.tap()
	return f.FS.Rename(from, to)
}
func (f *tappedFS) MkdirAll(dir string) error { f.tap(); return f.FS.MkdirAll(dir) }
func (f *tappedFS) SyncDir(dir string) error  { f.tap(); return f.FS.SyncDir(dir) }

type tappedFile struct {
	vfs.File
	fs *tappedFS
}

func (f tappedFile) WriteAt(p []byte, off int64) (int, error) {
	f.fs.tap()
	return f.File.WriteAt(p, off)
}
func (f tappedFile) WriteAtv(p [][]byte, off int64) (int, error) {
	f.fs.tap()
	return f.File.WriteAtv(p, off)
}
func (f tappedFile) Sync() error                 { f.fs.tap(); return f.File.Sync() }
func (f tappedFile) Allocate(off, n int64) error { f.fs.tap(); return f.File.Allocate(off, n) }
func (f tappedFile) Truncate(size int64) error   { f.fs.tap(); return f.File.Truncate(size) }
