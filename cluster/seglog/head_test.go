package seglog

import (
	"bytes"
	"math/rand/v2"
	"testing"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/payload"
	"firn.io/firn/internal/vfs"
)

// pinned is an Owner that points at all blocks of some segments.
type pinned map[SegmentID]bool

func (p pinned) LiveBlocks(s SegmentID) int {
	if p[s] {
		return 8
	}
	return 0
}
func (p pinned) LiveTotal() (n int64) {
	for s := range p {
		n += int64(p.LiveBlocks(s))
	}
	return n
}
func (p pinned) Live(s SegmentID, b uint16) bool                          { return p[s] }
func (p pinned) Describe(ReplicaKey, EntryID, []byte) (r Record, ok bool) { return r, false }
func (p pinned) ApplyMoves([]Move)                                        {}
func (p pinned) NeedSpace()                                               {}
func (p pinned) Damaged(Record, Location)                                 {}

// A segment that no entry claims any more, but that the index points into, must
// outlive the rot of its head (L4), also where a head of zeros looks like that of
// a segment that was never used, and where nothing of its headers is left.
func TestRottenHeadFreesNothingThatIsLive(t *testing.T) {
	zero := func(headers func(block int) bool) func(*testing.T, *vfs.Sim) {
		return func(t *testing.T, fs *vfs.Sim) {
			f, err := fs.Open("/d/log/00000001.seg", 0, vfs.ClassLog)
			if err != nil {
				t.Fatal(err)
			}
			p := make([]byte, block.Size)
			for b := range rottenSegmentBytes / block.Size {
				if _, err := f.ReadAt(p, int64(b)*block.Size); err != nil {
					t.Fatal(err)
				}
				if le.Uint32(p) == batchMagic && headers(b) {
					if _, err := f.WriteAt(make([]byte, block.Size), int64(b)*block.Size); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, rot := range map[string]func(*testing.T, *vfs.Sim){
		"bits": func(t *testing.T, fs *vfs.Sim) {
			if err := fs.Rot("/d/log/00000001.seg", 16, 8); err != nil {
				t.Fatal(err)
			}
		},
		"a head of zeros":    zero(func(b int) bool { return b == 0 }),
		"all headers zeroed": zero(func(int) bool { return true }),
	} {
		t.Run(name, func(t *testing.T) { t.Parallel(); rottenHead(t, rot) })
	}
}

const rottenSegmentBytes = 128 << 10

func rottenHead(t *testing.T, rot func(*testing.T, *vfs.Sim)) {
	const segmentBytes = rottenSegmentBytes
	fs := vfs.NewSim(0)
	sb := Superblock{Disk: block.DiskID{1}, SegmentBytes: segmentBytes}
	if err := Format(fs, "/d", sb); err != nil {
		t.Fatal(err)
	}
	key := ReplicaKey{1, 1}
	owner := pinned{1: true}
	applied := EntryID{10, 5}
	open := func() (*Log, *loop.World) {
		t.Helper()
		l, err := Open(fs, "/d", sb, Options{CapacityBytes: 12 * segmentBytes,
			Applied: func(ReplicaKey) (EntryID, bool) { return applied, true },
			Live:    func(s SegmentID, _ uint64) bool { return owner[s] }})
		if err != nil {
			t.Fatal(err)
		}
		w := loop.NewWorld(1)
		lp := w.NewLoop(nil)
		w.At(w.Now(), func() { lp.Post(func() { l.Start(lp, owner) }) })
		w.RunFor(time.Millisecond)
		return l, w
	}
	fill := func(l *Log, w *loop.World, n int) {
		t.Helper()
		r := l.Replica(key)
		for range n {
			e := makeFilled(r.LastIndex()+1, 5)
			r.Append(Write{Entries: []Entry{e}}, func(err error) {
				if err != nil {
					t.Error(err)
				}
			})
			e.Payload.Release()
			w.RunFor(20 * time.Millisecond)
			applied = EntryID{r.LastIndex(), 5}
			r.Append(Write{Truncate: &EntryID{r.LastIndex(), 5}}, func(error) {})
			w.RunFor(20 * time.Millisecond)
		}
	}
	l, w := open()
	l.Create(key, EntryID{10, 5}, HardState{Term: 5}, func(error) {})
	w.RunFor(20 * time.Millisecond)
	fill(l, w, 16)
	ended := false
	l.Close(func(error) { ended = true })
	if !w.RunUntil(time.Second, func() bool { return ended }) {
		t.Fatal("not closed")
	}
	want := payload.New(segmentBytes - block.Size)
	rot(t, fs)
	if err := readFile(fs, "/d/log/00000001.seg", want.Bytes()); err != nil {
		t.Fatal(err)
	}
	l, w = open()
	fill(l, w, 60)
	got := payload.New(segmentBytes - block.Size)
	if err := l.ReadBlocks(Location{1, 1}, got.Bytes()); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Bytes(), want.Bytes()) {
		t.Fatal("a segment that the index points into was overwritten")
	}
}

func makeFilled(index, term uint64) Entry {
	p := payload.New(4 * block.Size)
	for i := range p.Bytes() {
		p.Bytes()[i] = byte(index)
	}
	return Entry{Term: term, Index: index, Data: []byte("x"), Payload: p}
}

// readFile fills p with a segment from its second block on.
func readFile(fs vfs.FS, name string, p []byte) error {
	f, err := fs.Open(name, vfs.ReadOnly, vfs.ClassLog)
	if err != nil {
		return err
	}
	if _, err = f.ReadAt(p, block.Size); err != nil {
		return err
	}
	return f.Close()
}

// TestZeroedHeadOfTheNewestSegment: what the newest segment holds was
// acknowledged, and no index points into it yet. Its replicas come back damaged,
// or with all of it; never without it as if it had not been (L4, L5).
func TestZeroedHeadOfTheNewestSegment(t *testing.T) {
	t.Parallel()
	const segmentBytes = rottenSegmentBytes
	fs := vfs.NewSim(0)
	sb := Superblock{Disk: block.DiskID{1}, SegmentBytes: segmentBytes}
	if err := Format(fs, "/d", sb); err != nil {
		t.Fatal(err)
	}
	key := ReplicaKey{1, 1}
	open := func() (*Log, *loop.World) {
		t.Helper()
		l, err := Open(fs, "/d", sb, Options{CapacityBytes: 12 * segmentBytes,
			Applied: func(ReplicaKey) (EntryID, bool) { return EntryID{10, 5}, true },
			Live:    func(SegmentID, uint64) bool { return false }})
		if err != nil {
			t.Fatal(err)
		}
		w := loop.NewWorld(1)
		lp := w.NewLoop(nil)
		w.At(w.Now(), func() { lp.Post(func() { l.Start(lp, pinned{}) }) })
		w.RunFor(time.Millisecond)
		return l, w
	}
	l, w := open()
	l.Create(key, EntryID{10, 5}, HardState{Term: 5}, func(error) {})
	w.RunFor(20 * time.Millisecond)
	r := l.Replica(key)
	for range 16 {
		e := makeFilled(r.LastIndex()+1, 5)
		r.Append(Write{Entries: []Entry{e}}, func(err error) {
			if err != nil {
				t.Error(err)
			}
		})
		e.Payload.Release()
		w.RunFor(20 * time.Millisecond)
	}
	last := r.LastIndex()
	if !w.RunUntil(10*time.Second, func() bool { return r.Durable() == last }) {
		t.Fatalf("entry %d is not durable, %d is", last, r.Durable())
	}
	at, _, _ := r.Locate(last)
	fs = fs.Crash(rand.New(rand.NewPCG(1, 1)))
	f, err := fs.Open(segmentName("/d", at.Segment), 0, vfs.ClassLog)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, block.Size), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	l, _ = open()
	if r := l.Replica(key); r != nil && r.Damaged() == "" && r.LastIndex() < last {
		t.Errorf("the log ends at %d, %d was acknowledged, and nothing is said to be damaged", r.LastIndex(), last)
	}
}
