package seglog

import (
	"bytes"
	"fmt"
	"reflect"
	"testing"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/payload"
	"firn.io/firn/internal/vfs"
)

// sampleArea encodes one batch with a bit of everything.
func sampleArea() (header, []byte) {
	e := newEncoder(payload.New(maxHeaderBytes).Bytes())
	entries := []Entry{{Term: 7, Index: 21, Data: []byte("first")}, {Term: 8, Index: 22}, {Term: 8, Index: 23, Data: make([]byte, 5000)}}
	bytes := []int{block.Size, 0, 9000}
	e.section(&section{key: ReplicaKey{300, 2}, flags: sectionCreate, hard: HardState{8, 1, 20}, trunc: EntryID{20, 6}, last: 23, first: 21}, 3)
	for i := range entries {
		at := e.entry(&entries[i], bytes[i])
		le.PutUint32(e.area[at:], uint32(1000+i))
	}
	e.section(&section{key: ReplicaKey{1, 1}, last: 9, trunc: EntryID{9, 1}}, 0)
	e.move(&Record{Key: ReplicaKey{5, 6}, Volume: block.VolumeID{1, 2}, Chunk: 1 << 30, Block: 1008, Generation: 3, Written: block.MakeVersion(2, 77),
		CRCs: []uint32{9, 8, 7}})
	e.segments([]segmentUse{{1, 5}, {70000, 1 << 40}})
	e.voids([]void{{100, 163, 4}})
	h := header{kind: kindWrites, stream: survivors, cluster: block.ClusterID{1}, disk: block.DiskID{2}, segment: 9, block: 17, generation: 40, number: 50,
		durable: 49, payloadBlocks: 1 + 3 + 3, tails: [numStreams]position{{9, 17}, {3, 4}}}
	area := e.finish(&h)
	sealHeader(area[:h.headerBytes])
	return h, area
}

func TestBatchRoundTrip(t *testing.T) {
	h, area := sampleArea()
	got, ok := decodeFixed(area)
	if !ok || got != h {
		t.Fatalf("%v\n%+v\n%+v", ok, got, h)
	}
	if len(area)%block.Size != 0 || !checkArea(area[:h.headerBytes]) {
		t.Fatal("the area is not whole")
	}
	b, ok := decodeRecords(&got, area[:h.headerBytes])
	if !ok {
		t.Fatal("the records do not decode")
	}
	s := b.sections[0]
	first := h.block + h.headerBlocks()
	if len(s.entries) != 3 || s.entries[0].payload != first || s.entries[2].payload != first+1 || s.entries[2].crc != 1002 ||
		string(s.entries[0].data) != "first" || len(s.entries[2].data) != 5000 || s.first != 21 || s.trunc != (EntryID{20, 6}) || s.hard != (HardState{8, 1, 20}) {
		t.Fatalf("%+v", s)
	}
	m := b.moves[0]
	if m.payload != first+4 || m.Chunk != 1<<30 || m.Block != 1008 || m.Written != block.MakeVersion(2, 77) || !reflect.DeepEqual(m.CRCs, []uint32{9, 8, 7}) {
		t.Fatalf("%+v", m)
	}
	if !reflect.DeepEqual(b.claimed, []segmentUse{{1, 5}, {70000, 1 << 40}}) || b.voids[0] != (void{100, 163, 4}) {
		t.Fatalf("%v %v", b.claimed, b.voids)
	}
	for i := range area[:h.headerBytes] {
		area[i] ^= 1
		if checkArea(area[:h.headerBytes]) {
			t.Fatalf("a flipped bit in byte %d is not noticed", i)
		}
		area[i] ^= 1
	}
}

func FuzzBatch(f *testing.F) {
	h, area := sampleArea()
	f.Add(area[:h.headerBytes])
	f.Add(area)
	f.Add(make([]byte, block.Size))
	small := header{kind: kindMoves, generation: 1, number: 2, durable: 1, block: 1, payloadBlocks: 1}
	e := newEncoder(payload.New(maxHeaderBytes).Bytes())
	e.section(&section{key: ReplicaKey{1, 1}, last: 9, trunc: EntryID{8, 1}, first: 9}, 1)
	e.entry(&Entry{Term: 1, Data: []byte("x")}, 10)
	f.Add(bytes.Clone(e.finish(&small)[:small.headerBytes]))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, p []byte) {
		h, ok := decodeFixed(p)
		if !ok || int(h.headerBytes) > len(p) {
			return
		}
		checkArea(p[:h.headerBytes])
		b, ok := decodeRecords(&h, p[:h.headerBytes])
		if !ok {
			return
		}
		// What decodes lies within the batch.
		for _, s := range b.sections {
			for _, e := range s.entries {
				if e.payload+blocksOf(int(e.payloadBytes)) > h.next() {
					t.Fatalf("payload at %d+%d of a batch that ends at %d", e.payload, e.payloadBytes, h.next())
				}
			}
		}
		for _, m := range b.moves {
			if m.payload+uint32(len(m.CRCs)) > h.next() {
				t.Fatal("moved payload outside of the batch")
			}
		}
	})
}

func FuzzSuperblock(f *testing.F) {
	good, _ := encodeSuperblock(Superblock{Cluster: block.ClusterID{1}, Disk: block.DiskID{2}, Node: 3, SegmentBytes: DefaultSegmentBytes, Created: "2026"})
	f.Add(good)
	f.Add([]byte("{}\n00000000\n"))
	f.Add([]byte{})
	line := []byte(`{"format":2}` + "\n")
	f.Add(fmt.Appendf(line, "%08x\n", block.CRC(line)))
	f.Fuzz(func(t *testing.T, p []byte) {
		sb, err := decodeSuperblock(p)
		if err != nil {
			return
		}
		again, err := encodeSuperblock(sb)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := decodeSuperblock(again); err != nil || back != sb {
			t.Fatalf("%+v, %v", back, err)
		}
	})
}

func TestSuperblock(t *testing.T) {
	fs := vfs.NewSim(0)
	sb := Superblock{Cluster: block.ClusterID{1}, Disk: block.DiskID{2}, Node: 3, SegmentBytes: DefaultSegmentBytes, Created: "2026-11-24"}
	if _, err := Load(fs, "/d"); block.KindOf(err) != block.NotFound {
		t.Fatal(err)
	}
	if err := Format(fs, "/d", sb); err != nil {
		t.Fatal(err)
	}
	if err := Format(fs, "/d", sb); block.KindOf(err) != block.Exists {
		t.Fatal(err)
	}
	if got, err := Load(fs, "/d"); err != nil || got != sb {
		t.Fatalf("%+v, %v", got, err)
	}
	for _, c := range []struct {
		edit func(p []byte) []byte
		want block.Kind
	}{
		{func(p []byte) []byte { p[20] ^= 1; return p }, block.Corrupt},
		{func(p []byte) []byte { return p[:10] }, block.Corrupt},
		{func(p []byte) []byte { return nil }, block.Corrupt},
		{func([]byte) []byte {
			line := []byte(`{"format":99}` + "\n")
			return fmt.Appendf(line, "%08x\n", block.CRC(line))
		}, block.Unsupported},
	} {
		p, _ := encodeSuperblock(sb)
		if err := vfs.WriteFileAtomic(fs, "/d/"+superblockName, c.edit(bytes.Clone(p))); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(fs, "/d"); block.KindOf(err) != c.want {
			t.Errorf("%v, want kind %v", err, c.want)
		}
	}
	for _, n := range []int64{0, 4096, minSegmentBytes + 1, MaxSegmentBytes + 4096} {
		sb.SegmentBytes = n
		if err := Format(fs, "/e", sb); block.KindOf(err) != block.Invalid {
			t.Errorf("segments of %d bytes: %v", n, err)
		}
	}
}
