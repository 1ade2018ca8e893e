package seglog

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/payload"
	"firn.io/firn/internal/vfs"
)

// damaged disks: what recovery makes of each kind of damage (L2, L4). The log
// holds two replicas in segment 1, batches at known blocks:
//
//	0 table, 1 creation of A and B, then A 11, B 11, A 12, B 12 (a batch each),
//	and, if the case asks for it, a state table of a later segment.
func rotRig(t *testing.T, applied map[ReplicaKey]EntryID) (g *rig, a, b ReplicaKey, at []uint32) {
	g = newRig(t, 1, minSegmentBytes, 12)
	g.damaged = true
	g.open()
	a, b = ReplicaKey{1, 1}, ReplicaKey{2, 1}
	g.create(a)
	g.create(b)
	g.run(time.Millisecond)
	for i := range uint64(2) {
		for _, k := range []ReplicaKey{a, b} {
			at = append(at, g.log.w.open[fresh].next)
			p := payload.Copy(bytes.Repeat([]byte{byte(i)}, block.Size))
			e := Entry{Term: 5, Index: 11 + i, Data: []byte("data"), Payload: p}
			g.loop.Post(func() { g.log.Replica(k).Append(Write{Entries: []Entry{e}}, func(error) {}) })
			g.run(time.Millisecond)
		}
	}
	g.index.durable.applied = applied
	g.loop.Kill()
	return g, a, b, at
}

func (g *rig) rot(seg SegmentID, at uint32, off int64) {
	if err := g.fs.Rot(segmentName(rigDir, seg), int64(at)*block.Size+off, 1); err != nil {
		g.t.Fatalf("%v", err)
	}
}

func TestRotAndTornWrites(t *testing.T) {
	a, b := ReplicaKey{1, 1}, ReplicaKey{2, 1}
	type want struct {
		lastA, lastB uint64
		damaged      []ReplicaKey
		corruptA     uint64 // entry of A whose payload must read as corrupt
		corruptB     uint64 // and of B
	}
	cases := []struct {
		name    string
		applied map[ReplicaKey]EntryID
		rot     func(g *rig, at []uint32)
		want    want
	}{
		{"nothing", nil, func(*rig, []uint32) {}, want{lastA: 12, lastB: 12}},
		{"last header: torn", nil, func(g *rig, at []uint32) { g.rot(1, at[3], 60) }, want{lastA: 12, lastB: 11}},
		{"last payload: torn", nil, func(g *rig, at []uint32) { g.rot(1, at[3]+1, 0) }, want{lastA: 12, lastB: 11}},
		{"last payload, but applied: rot", map[ReplicaKey]EntryID{b: {12, 5}}, func(g *rig, at []uint32) { g.rot(1, at[3]+1, 0) },
			want{lastA: 12, lastB: 12, corruptB: 12}},
		{"last header, but applied: the log goes on behind", map[ReplicaKey]EntryID{b: {12, 5}}, func(g *rig, at []uint32) { g.rot(1, at[3], 200) },
			want{lastA: 12, lastB: 12}},
		{"earlier payload: rot, and nothing is cut off", nil, func(g *rig, at []uint32) { g.rot(1, at[0]+1, 77) },
			want{lastA: 12, lastB: 12, corruptA: 11}},
		{"earlier header: the replica with a hole", nil, func(g *rig, at []uint32) { g.rot(1, at[0], 150) },
			want{lastA: 10, lastB: 12, damaged: []ReplicaKey{a}}},
		{"earlier header, applied: the log goes on behind", map[ReplicaKey]EntryID{a: {11, 5}}, func(g *rig, at []uint32) { g.rot(1, at[0], 150) },
			want{lastA: 12, lastB: 12}},
		{"newest header of B that is durable: B may have lost its vote", nil, func(g *rig, at []uint32) {
			g.append2(a, 13)
			g.rot(1, at[3], 0)
		}, want{lastA: 13, lastB: 11, damaged: []ReplicaKey{b}}},
		{"newest header of A, a later one shows it: A may have lost its vote", nil, func(g *rig, at []uint32) { g.rot(1, at[2], 150) },
			want{lastA: 11, lastB: 12, damaged: []ReplicaKey{a}}},
		{"earlier header of B, bits and identity", nil, func(g *rig, at []uint32) { g.rot(1, at[1], 8); g.rot(1, at[1], 4000) },
			want{lastA: 12, lastB: 10, damaged: []ReplicaKey{b}}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			g, a, b, at := rotRig(t, c.applied)
			g.t = t
			if strings.HasPrefix(c.name, "newest") { // one more batch, so that the one before is known to be durable
				if err := g.tryOpen(); err != nil {
					t.Fatal(err)
				}
				g.start2()
			}
			c.rot(g, at)
			for pass := range 2 { // what was found once is found again
				if err := g.tryOpen(); err != nil {
					t.Fatal(err)
				}
				var got []ReplicaKey
				for _, d := range g.log.Damaged() {
					got = append(got, d.Key)
				}
				if len(got) != len(c.want.damaged) || len(got) > 0 && got[0] != c.want.damaged[0] {
					t.Fatalf("pass %d: damaged %v, want %v (%v)", pass, g.log.Damaged(), c.want.damaged, g.logged)
				}
				if la, lb := g.log.Replica(a).LastIndex(), g.log.Replica(b).LastIndex(); la != c.want.lastA || lb != c.want.lastB {
					t.Fatalf("pass %d: logs end at %d and %d, want %d and %d (%v)", pass, la, lb, c.want.lastA, c.want.lastB, g.logged)
				}
				for k, i := range map[ReplicaKey]uint64{a: c.want.corruptA, b: c.want.corruptB} {
					if i == 0 {
						continue
					}
					if _, err := g.log.Replica(k).Read(i, i+1, 1<<20, true); block.KindOf(err) != block.Corrupt {
						t.Fatalf("a rotten payload read as %v", err)
					}
					if e, err := g.log.Replica(k).Read(i, i+1, 1<<20, false); err != nil || len(e) != 1 {
						t.Fatalf("its header is whole, but reads as %v", err)
					}
				}
			}
		})
	}
}

func (g *rig) start2() {
	g.loop.Post(func() { g.log.Start(g.loop, g.index) })
	g.run(0)
}

func (g *rig) append2(k ReplicaKey, i uint64) {
	g.loop.Post(func() {
		g.log.Replica(k).Append(Write{Entries: []Entry{{Term: 5, Index: i, Data: []byte("data")}}}, func(error) {})
	})
	g.run(time.Millisecond)
	g.loop.Kill()
}

// TestRottenHead loses the newest state table, at the head of a segment that
// holds acknowledged entries: they are found all the same.
func TestRottenHead(t *testing.T) {
	g := newRig(t, 1, minSegmentBytes, 12)
	g.open()
	k := ReplicaKey{1, 1}
	g.create(k)
	for i := range uint64(10) {
		g.append(k, 11+4*i, 5, 4)
		g.run(2 * time.Millisecond)
	}
	s := g.log.w.open[fresh]
	if s.next < 4 || s.id == 1 {
		t.Fatalf("the script must end within a later segment, not at block %d of %d", s.next, s.id)
	}
	g.loop.Kill()
	g.rot(s.id, 0, 300)
	g.open()
}

// TestRotAfterACleanStop damages the last batch of a log that was closed: it
// was acknowledged, and must not pass for torn.
func TestRotAfterACleanStop(t *testing.T) {
	g := newRig(t, 1, minSegmentBytes, 12)
	g.damaged = true
	g.open()
	k := ReplicaKey{1, 1}
	g.create(k)
	g.run(time.Millisecond)
	at := g.log.w.open[fresh].next
	g.append(k, 11, 5, 1)
	g.run(time.Millisecond)
	g.close()
	g.rot(1, at, 130)
	if err := g.tryOpen(); err != nil {
		t.Fatal(err)
	}
	if d := g.log.Damaged(); len(d) != 1 {
		t.Fatalf("damaged %v, log ends at %d", d, g.log.Replica(k).LastIndex())
	}
}

// TestRotAmongSurvivors damages one block of the last batch of survivors, which
// a later batch of the other stream shows to be durable: the batch stays, and
// the next one does not take the place of its other blocks.
func TestRotAmongSurvivors(t *testing.T) {
	g := newRig(t, 1, minSegmentBytes, 20)
	g.open()
	for i := range uint64(40) {
		k := ReplicaKey{block.GroupID(i%4 + 1), 1}
		if i < 4 {
			g.create(k)
		}
		s := g.reps[k].now()
		g.append(k, s.last()+1, 5, 10)
		g.run(2 * time.Millisecond)
		for _, k := range g.keys {
			g.apply(k)
		}
		g.checkpoint()
		for _, k := range g.keys {
			g.truncate(k, 0)
		}
		g.run(10 * time.Millisecond)
	}
	g.run(time.Second)
	s := g.log.w.open[survivors]
	if s == nil || g.log.w.durable == s.last {
		t.Fatal("the script must end with an open segment of survivors that is not the newest")
	}
	id, next := s.id, s.next
	g.loop.Kill()
	g.rot(id, next-1, 9)
	if err := g.tryOpen(); err != nil {
		t.Fatal(err)
	}
	if s := g.log.w.open[survivors]; s == nil || s.id != id || s.next != next {
		t.Fatalf("survivors go on at %+v, not at block %d of segment %d", s, next, id)
	}
}

// TestUnreadableSector gives an I/O error where a header is: as good as rotten.
func TestUnreadableSector(t *testing.T) {
	g, a, b, at := rotRig(t, nil)
	bad := int64(at[0]) * block.Size
	g.fs.SetRule(func(c vfs.Call) error {
		if c.Op == vfs.OpRead && c.Name == segmentName(rigDir, 1) && c.Off <= bad && bad < c.Off+int64(c.Len) {
			return block.Errorf(block.Internal, "input/output error")
		}
		return nil
	})
	if err := g.tryOpen(); err != nil {
		t.Fatal(err)
	}
	if d := g.log.Damaged(); len(d) != 1 || d[0].Key != a || g.log.Replica(b).LastIndex() != 12 {
		t.Fatalf("%v, B ends at %d", d, g.log.Replica(b).LastIndex())
	}
}

func TestFailedSyncIsFinal(t *testing.T) {
	g := newRig(t, 1, minSegmentBytes, 12)
	g.open()
	k := ReplicaKey{1, 1}
	g.create(k)
	g.run(time.Millisecond)
	fail := true
	g.fs.SetRule(func(c vfs.Call) error {
		if c.Op == vfs.OpSync && fail && strings.HasSuffix(c.Name, ".seg") {
			fail = false
			return block.Errorf(block.Internal, "input/output error")
		}
		return nil
	})
	var answers []error
	note := func(err error) { answers = append(answers, err) }
	entry := func(i uint64) Write {
		return Write{Entries: []Entry{{Term: 5, Index: i, Payload: payload.Copy(make([]byte, block.Size))}}}
	}
	g.loop.Post(func() { g.log.Replica(k).Append(entry(11), note) })
	g.run(time.Microsecond)
	g.loop.Post(func() { g.log.Replica(k).Append(entry(12), note) })
	g.run(time.Second)
	g.loop.Post(func() { g.log.Replica(k).Append(entry(13), note) })
	g.run(time.Second)
	if len(answers) != 3 {
		t.Fatalf("%d answers to 3 writes", len(answers))
	}
	for _, err := range answers {
		if block.KindOf(err) != block.Unavailable {
			t.Fatalf("a write to a failed disk was answered with %v", err)
		}
	}
	if g.failed == nil || g.log.Err() == nil {
		t.Fatal("nobody was told that the disk failed")
	}
	closed := false
	g.loop.Post(func() { g.log.Close(func(error) { closed = true }) })
	g.run(time.Second)
	if !closed {
		t.Fatal("a failed log does not close")
	}
	for range 2 {
		if err := g.tryOpen(); block.KindOf(err) != block.Unavailable {
			t.Fatalf("a restart uses the failed disk: %v", err)
		}
	}
	// Another disk in the same place is not the failed one.
	other := g.sb
	other.Disk = block.DiskID{9}
	if _, failed, err := FailedReason(g.fs, rigDir, other); failed || err != nil {
		t.Fatalf("%v, %v", failed, err)
	}
}

// TestRottenCreation: a replica whose creation has rotted is damaged, not forgotten:
// made anew it would vote a second time. That holds for one that later batches
// speak of, and for one that only the index knows.
func TestRottenCreation(t *testing.T) {
	t.Parallel()
	for _, idle := range []bool{false, true} {
		a, b := ReplicaKey{1, 1}, ReplicaKey{2, 1}
		g := newRig(t, 1, minSegmentBytes, 12)
		g.damaged = true
		g.open()
		g.create(a)
		g.run(time.Millisecond)
		at := g.log.w.open[fresh].next
		g.create(b)
		g.run(time.Millisecond)
		g.append(a, 11, 5, 1)
		g.run(time.Millisecond)
		if !idle {
			g.append(b, 11, 5, 1)
			g.run(time.Millisecond)
		}
		g.index.durable.applied = map[ReplicaKey]EntryID{a: {10, 5}, b: {10, 5}}
		g.loop.Kill()
		g.rot(1, at, 130)
		for pass := range 2 {
			g.index.now = g.index.durable.clone()
			o := g.options()
			o.Known = []ReplicaKey{a, b}
			l, err := Open(g.fs, rigDir, g.sb, o)
			if err != nil {
				t.Fatal(err)
			}
			if l.Replica(b) == nil || l.Replica(b).Damaged() == "" {
				t.Errorf("idle %v, pass %d: the replica is forgotten, or trusted: %v", idle, pass, l.Damaged())
			}
			if l.Replica(a) == nil || l.Replica(a).LastIndex() < 11 {
				t.Errorf("idle %v, pass %d: the other one has lost something", idle, pass)
			}
		}
	}
}
