package vfs_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/vfs"
	"firn.io/firn/internal/vfs/vfstest"
)

func TestOS(t *testing.T) { vfstest.Run(t, vfs.NewOS(), t.TempDir()) }

func TestPoolOfNone(t *testing.T) { vfstest.Run(t, vfs.NewPool(vfs.NewOS(), 0), t.TempDir()) }

func TestSim(t *testing.T) {
	fs := vfs.NewSim(0)
	if err := fs.MkdirAll("/disk"); err != nil {
		t.Fatal(err)
	}
	vfstest.Run(t, fs, "/disk")
}

func rng(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 77)) }

func open(t *testing.T, fs vfs.FS, name string, f vfs.Flags) vfs.File {
	t.Helper()
	file, err := fs.Open(name, f, vfs.ClassOther)
	if err != nil {
		t.Fatal(err)
	}
	return file
}

func write(t *testing.T, f vfs.File, b byte, off int64, n int) {
	t.Helper()
	if _, err := f.WriteAt(bytes.Repeat([]byte{b}, n), off); err != nil {
		t.Fatal(err)
	}
}

func TestCrashKeepsTheSyncedAndAnySectorsOfTheRest(t *testing.T) {
	counts := map[string]int{}
	for seed := range uint64(300) {
		fs := vfs.NewSim(0)
		f := open(t, fs, "/f", vfs.Create)
		write(t, f, 'a', 0, 1024)
		f.Sync()
		fs.SyncDir("/")
		write(t, f, 'b', 0, 1024)
		write(t, f, 'c', 512, 512)
		after := fs.Crash(rng(seed))
		got, err := vfs.ReadFile(after, "/f", 1<<20)
		if err != nil || len(got) != 1024 {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
		for s := range 2 {
			if !bytes.Equal(got[s*512:(s+1)*512], bytes.Repeat(got[s*512:s*512+1], 512)) {
				t.Fatal("a sector was torn")
			}
		}
		counts[string(got[0])+string(got[512])]++
	}
	for _, want := range []string{"aa", "ab", "ac", "ba", "bb", "bc"} {
		if counts[want] == 0 {
			t.Errorf("%q never happened: %v", want, counts)
		}
	}
	if len(counts) != 6 {
		t.Errorf("impossible outcomes: %v", counts)
	}
}

func TestCrashWithoutChanceKeepsTheSyncedOnly(t *testing.T) {
	fs := vfs.NewSim(0)
	f := open(t, fs, "/f", vfs.Create)
	write(t, f, 'a', 0, 5000)
	f.Sync()
	fs.SyncDir("/")
	write(t, f, 'b', 0, 9000)
	open(t, fs, "/g", vfs.Create)
	after := fs.Crash(nil)
	got, err := vfs.ReadFile(after, "/f", 1<<20)
	if err != nil || !bytes.Equal(got, bytes.Repeat([]byte{'a'}, 5000)) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	if _, err := after.Stat("/g"); block.KindOf(err) != block.NotFound {
		t.Fatalf("%v", err)
	}
}

func TestCrashDecidesOnNames(t *testing.T) {
	counts := map[string]int{}
	for seed := range uint64(200) {
		fs := vfs.NewSim(0)
		f := open(t, fs, "/old", vfs.Create)
		write(t, f, 'x', 0, 1)
		f.Sync()
		fs.SyncDir("/")
		if err := fs.Rename("/old", "/new"); err != nil {
			t.Fatal(err)
		}
		fs.Remove("/new")
		after := fs.Crash(rng(seed))
		names, _ := after.List("/")
		counts[fmt.Sprint(names)]++
	}
	if len(counts) != 3 || counts["[old]"] == 0 || counts["[new]"] == 0 || counts["[]"] == 0 {
		t.Fatalf("outcomes %v: a rename is atomic, and its successor needs it", counts)
	}
}

func TestAtomicFileHasOldOrNewContentAtEveryCrash(t *testing.T) {
	boom := errors.New("power is off")
	for at := 0; ; at++ {
		finished := false
		for seed := range uint64(20) {
			fs := vfs.NewSim(0)
			if err := vfs.WriteFileAtomic(fs, "/f", []byte("old")); err != nil {
				t.Fatal(err)
			}
			n := 0
			fs.SetRule(func(vfs.Call) error {
				if n == at {
					fs.Kill(boom)
				}
				n++
				return nil
			})
			err := vfs.WriteFileAtomic(fs, "/f", bytes.Repeat([]byte("new"), 1000))
			finished = err == nil
			got, rerr := vfs.ReadFile(fs.Crash(rng(seed)), "/f", 1<<20)
			isNew := bytes.Equal(got, bytes.Repeat([]byte("new"), 1000))
			if rerr != nil || !isNew && (string(got) != "old" || finished) {
				t.Fatalf("crash at call %d: %d bytes, %v", at, len(got), rerr)
			}
		}
		if finished {
			return
		}
	}
}

func TestFailedSyncIsFinal(t *testing.T) {
	fs := vfs.NewSim(0)
	f := open(t, fs, "/f", vfs.Create)
	write(t, f, 'a', 0, 512)
	f.Sync()
	fs.SyncDir("/")
	write(t, f, 'b', 0, 512)
	fs.SetRule(func(c vfs.Call) error {
		if c.Op == vfs.OpSync {
			return block.Errorf(block.Internal, "input/output error")
		}
		return nil
	})
	if f.Sync() == nil {
		t.Fatal("the sync did not fail")
	}
	fs.SetRule(nil)
	p := make([]byte, 1)
	f.ReadAt(p, 0)
	if err := f.Sync(); err != nil || p[0] != 'b' {
		t.Fatalf("after the failed sync: %v, %q", err, p)
	}
	for seed := range uint64(20) {
		got, _ := vfs.ReadFile(fs.Crash(rng(seed)), "/f", 512)
		if got[0] != 'a' {
			t.Fatal("a sync that succeeded later wrote what the failed one had dropped")
		}
	}
}

func TestFullDisk(t *testing.T) {
	fs := vfs.NewSim(10000)
	f := open(t, fs, "/f", vfs.Create)
	if err := f.Allocate(0, 8192); err != nil {
		t.Fatal(err)
	}
	g := open(t, fs, "/g", vfs.Create)
	if _, err := g.WriteAt(make([]byte, 4096), 0); block.KindOf(err) != block.NoSpace {
		t.Fatalf("%v", err)
	}
	write(t, f, 'x', 0, 8192)
	if err := fs.Remove("/f"); err != nil {
		t.Fatal(err)
	}
	write(t, g, 'x', 0, 4096)
	if sp, _ := fs.Space("/"); sp.TotalBytes != 10000 || sp.FreeBytes != 10000-4096 {
		t.Fatalf("%+v", sp)
	}
}

func TestRotAndLocksAfterCrash(t *testing.T) {
	fs := vfs.NewSim(0)
	if _, err := vfs.Lock(fs, "/d"); err != nil {
		t.Fatal(err)
	}
	f := open(t, fs, "/d/f", vfs.Create)
	write(t, f, 0, 0, 1000)
	f.Sync()
	fs.SyncDir("/d")
	if err := fs.Rot("/d/f", 600, 2); err != nil {
		t.Fatal(err)
	}
	fs = fs.Crash(nil)
	got, _ := vfs.ReadFile(fs, "/d/f", 1000)
	if got[599] != 0 || got[600] != 0xff || got[601] != 0xff || got[602] != 0 {
		t.Fatal("the wrong bytes rotted")
	}
	if _, err := vfs.Lock(fs, "/d"); err != nil {
		t.Fatalf("a crash must free locks: %v", err)
	}
}

func TestShortWrite(t *testing.T) {
	fs := vfs.NewSim(0)
	f := open(t, fs, "/f", vfs.Create)
	boom := errors.New("input/output error")
	fs.SetRule(func(c vfs.Call) error {
		if c.Op == vfs.OpWrite {
			return &vfs.Partial{Bytes: 700, Err: boom}
		}
		return nil
	})
	n, err := f.WriteAtv([][]byte{bytes.Repeat([]byte{'a'}, 500), bytes.Repeat([]byte{'b'}, 500)}, 10)
	if n != 700 || !errors.Is(err, boom) {
		t.Fatalf("%d, %v", n, err)
	}
	fs.SetRule(nil)
	got, err := vfs.ReadFile(fs, "/f", 1<<20)
	if err != nil || len(got) != 710 || got[509] != 'a' || got[510] != 'b' || got[709] != 'b' {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
}

func TestMisdirectedAndStaleReads(t *testing.T) {
	fs := vfs.NewSim(0)
	fault := vfs.ReadFault{}
	fs.SetReadRule(func(vfs.Call) vfs.ReadFault { return fault })
	f := open(t, fs, "/f", vfs.Create)
	for i, b := range []byte("abc") {
		write(t, f, b, int64(i)*4096, 4096)
	}
	f.Sync()
	write(t, f, 'x', 4096, 512)
	f.Sync()
	read := func(off int64, n int) string {
		p := make([]byte, n)
		if _, err := f.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
		return string(p[0]) + string(p[n-1])
	}
	if got := read(4096, 4096); got != "xb" {
		t.Fatalf("without a fault %q", got)
	}
	fault = vfs.ReadFault{Shift: 4096}
	if got := read(4096, 4096); got != "cc" {
		t.Fatalf("misdirected %q", got)
	}
	fault = vfs.ReadFault{Stale: true}
	if got := read(4096, 4096); got != "bb" {
		t.Fatalf("stale %q", got)
	}
	if got := read(0, 4096); got != "\x00\x00" {
		t.Fatalf("stale, before the first write: %q", got)
	}
	boom := errors.New("input/output error")
	fault = vfs.ReadFault{Err: boom}
	if _, err := f.ReadAt(make([]byte, 1), 0); !errors.Is(err, boom) {
		t.Fatal(err)
	}
}

func TestStallHoldsCallsBack(t *testing.T) {
	fs := vfs.NewSim(0)
	f := open(t, fs, "/f", vfs.Create)
	release := fs.Stall()
	synced := make(chan error)
	go func() { synced <- f.Sync() }()
	select {
	case err := <-synced:
		t.Fatalf("the sync did not wait (%v)", err)
	default:
	}
	if _, err := fs.Stat("/f"); err != nil {
		t.Fatal(err) // names need no disk
	}
	release()
	if err := <-synced; err != nil {
		t.Fatal(err)
	}
}

func TestCrashDecidesOnLengths(t *testing.T) {
	counts := map[int]int{}
	for seed := range uint64(200) {
		fs := vfs.NewSim(0)
		f := open(t, fs, "/f", vfs.Create)
		write(t, f, 'a', 0, 1000)
		f.Sync()
		fs.SyncDir("/")
		write(t, f, 'b', 1000, 1000)
		if err := f.Truncate(500); err != nil {
			t.Fatal(err)
		}
		got, err := vfs.ReadFile(fs.Crash(rng(seed)), "/f", 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		counts[len(got)]++
	}
	if len(counts) != 3 || counts[500] == 0 || counts[1000] == 0 || counts[2000] == 0 {
		t.Fatalf("lengths %v", counts)
	}
}

// TestLockedFolder is named, in words for people.
func TestLockedFolder(t *testing.T) {
	fs, dir := vfs.NewOS(), t.TempDir()
	l, err := vfs.Lock(fs, dir)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, err = vfs.Lock(fs, dir)
	if block.KindOf(err) != block.Busy || !strings.Contains(err.Error(), dir) || strings.Contains(err.Error(), "temporarily") {
		t.Errorf("%v", err)
	}
}
