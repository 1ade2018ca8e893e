package index

import (
	"bytes"
	"reflect"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"firn.io/firn/cluster/seglog"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// TestKeyOrder: keys sort as what they name does, newer generations and writes first.
func TestKeyOrder(t *testing.T) {
	t.Parallel()
	name := rapid.Custom(func(t *rapid.T) extentKey {
		few := rapid.SampledFrom([]uint64{0, 1, 255, 256, 1023})
		return extentKey{uint32(few.Draw(t, "volume")), block.Chunk(few.Draw(t, "chunk")), uint16(few.Draw(t, "block") % 1024),
			block.Generation(few.Draw(t, "generation")), block.Version(few.Draw(t, "written") << rapid.SampledFrom([]int{0, 48}).Draw(t, "era"))}
	})
	less := func(a, b extentKey) int {
		for _, c := range [][2]uint64{{uint64(a.volume), uint64(b.volume)}, {uint64(a.chunk), uint64(b.chunk)}, {uint64(a.block), uint64(b.block)},
			{uint64(b.gen), uint64(a.gen)}, {uint64(b.written), uint64(a.written)}} {
			if c[0] != c[1] {
				if c[0] < c[1] {
					return -1
				}
				return 1
			}
		}
		return 0
	}
	rapid.Check(t, func(t *rapid.T) {
		a, b := name.Draw(t, "a"), name.Draw(t, "b")
		ka, kb := appendExtentKey(nil, 7, a), appendExtentKey(nil, 7, b)
		if got := bytes.Compare(ka, kb); got != less(a, b) {
			t.Fatalf("%+v and %+v compare as %d", a, b, got)
		}
		if got, ok := decodeExtentKey(ka); !ok || got != a {
			t.Fatalf("%+v comes back as %+v, %v", a, got, ok)
		}
		prefix := appendExtentPrefix(nil, 7, b.volume, b.chunk, b.block)
		before := less(extentKey{a.volume, a.chunk, a.block, 0, 0}, extentKey{b.volume, b.chunk, b.block, 0, 0}) < 0
		if (bytes.Compare(ka, prefix) < 0) != before {
			t.Fatalf("%+v and the prefix of %+v", a, b)
		}
		if other := appendExtentKey(nil, 8, a); bytes.Compare(kb, other) >= 0 {
			t.Fatal("replicas interleave")
		}
	})
}

func TestKeysOfKindsAreApart(t *testing.T) {
	t.Parallel()
	keys := [][]byte{
		appendHead(nil, 0, kindFormat), appendCatalogKey(nil, seglog.ReplicaKey{Group: 1, Replica: 2}),
		appendHead(nil, 1, kindGroup), appendVolumeKey(nil, 1, kindVolume, block.VolumeID{9}), appendVolumeKey(nil, 1, kindValue, block.VolumeID{1}),
		appendMarkerKey(nil, 1, 1, block.GenerationLatest, span{0, maxChunk, 0}), appendChunkKey(nil, 1, 1, 5), appendLiveKey(nil, 1, 1, 1),
		appendUsageKey(nil, 1, 1), appendExtentKey(nil, 1, extentKey{volume: 1}), appendHead(nil, 2, 0),
	}
	if !slices.IsSortedFunc(keys, bytes.Compare) {
		t.Fatalf("%x", keys)
	}
	if k, ok := decodeCatalogKey(keys[1]); !ok || k != (seglog.ReplicaKey{Group: 1, Replica: 2}) {
		t.Error("catalog key")
	}
	if v, g, s, ok := decodeMarkerKey(keys[5]); !ok || v != 1 || g != block.GenerationLatest || s != (span{0, maxChunk, 0}) {
		t.Error("marker key")
	}
}

func FuzzDecodeExtent(f *testing.F) {
	for _, e := range []stored{
		{count: 1, place: Place{At: seglog.Location{Segment: 1, Block: 2}}, crcs: []uint32{3}},
		{count: 16, place: Place{At: seglog.Location{Segment: 1 << 30, Block: 60000}}, crcs: make([]uint32, 16)},
		{count: 4, place: Place{Kind: KindZero}},
		{count: 2, place: Place{At: seglog.Location{Segment: 5}, Framed: true, Skip: 3, Codec: 1, Key: 9, Stored: 777}, crcs: make([]uint32, 2)},
		{count: 2, place: Place{Kind: KindCold, Framed: true, Object: 7, Offset: 1 << 20, Stored: 5000}, crcs: make([]uint32, 2)},
	} {
		f.Add(uint16(0), appendExtent(nil, &e))
	}
	f.Fuzz(func(t *testing.T, first uint16, p []byte) {
		var e stored
		if _, err := decodeExtent(&e, first%1024, p, nil); err != nil {
			return
		}
		if got := appendExtent(nil, &e); !bytes.Equal(got, p) {
			t.Fatalf("%x decodes to %+v, which is %x", p, e, got)
		}
	})
}

func FuzzDecodeChunk(f *testing.F) {
	f.Add(appendChunk(nil, &chunkRecord{version: 5, changed: 5}))
	f.Add(appendChunk(nil, &chunkRecord{version: 5, changed: 6, objects: []object{{1, 1 << 22, "a/b"}, {2, 9, "c"}}}))
	f.Fuzz(func(t *testing.T, p []byte) {
		c, err := decodeChunk(p)
		if err != nil {
			return
		}
		if got := appendChunk(nil, &c); !bytes.Equal(got, p) {
			t.Fatalf("%x decodes to %+v, which is %x", p, c, got)
		}
	})
}

func FuzzDecodeGroup(f *testing.F) {
	f.Add(appendGroup(nil, &groupRecord{applied: 1, term: 2, era: 3, feature: 4, volumes: 5, conf: []byte("conf")}))
	f.Fuzz(func(t *testing.T, p []byte) {
		g, err := decodeGroup(p)
		if err != nil {
			return
		}
		if got := appendGroup(nil, &g); !bytes.Equal(got, p) {
			t.Fatalf("%x decodes to %+v, which is %x", p, g, got)
		}
	})
}

func FuzzDecodeInstalling(f *testing.F) {
	f.Add(appendInstalling(nil, &installing{base: 7, target: 9}))
	f.Fuzz(func(t *testing.T, p []byte) {
		i, err := decodeInstalling(p)
		if err != nil {
			return
		}
		if got := appendInstalling(nil, i); !bytes.Equal(got, p) {
			t.Fatalf("%x decodes to %+v, which is %x", p, i, got)
		}
	})
}

func FuzzDecodeVolume(f *testing.F) {
	v := &volume{number: 3, record: wire.VolumeRecord{Volume: block.VolumeID{1}, Epoch: 4, Nonce: 5, Generation: 6, Size: 7, Settings: 8, ReadOnly: true},
		replacedEpoch: 2, replacedNonce: 3, retained: retention{from: 6, list: []block.Generation{1, 4}}, floorVersion: 99}
	v.window.reset()
	f.Add(appendVolume(nil, v, v.floorVersion))
	v.window.remember(5, wire.OutcomeReadOnly)
	v.record.Tombstone = true
	f.Add(appendVolume(nil, v, v.floorVersion))
	f.Fuzz(func(t *testing.T, p []byte) {
		v, err := decodeVolume(block.VolumeID{1}, p)
		if err != nil {
			return
		}
		if got := appendVolume(nil, v, v.floorVersion); !bytes.Equal(got, p) {
			t.Fatalf("%x decodes to %+v, which is %x", p, v, got)
		}
	})
}

func FuzzDecodeBitmap(f *testing.F) {
	f.Add(appendBitmap(nil, bitmap{1, 0, 1 << 63}))
	f.Add(appendBitmap(nil, bitmap{^uint64(0)}))
	f.Fuzz(func(t *testing.T, p []byte) {
		b, err := decodeBitmap(p)
		if err != nil {
			return
		}
		again, err := decodeBitmap(appendBitmap(nil, b))
		if b.count() > 0 && (err != nil || !reflect.DeepEqual(trim(b), trim(again))) {
			t.Fatalf("%x decodes to %v, then to %v, %v", p, b, again, err)
		}
	})
}

func trim(b bitmap) bitmap {
	for len(b) > 0 && b[len(b)-1] == 0 {
		b = b[:len(b)-1]
	}
	return b
}

func FuzzDecodeKeys(f *testing.F) {
	f.Add(appendMarkerKey(nil, 1, 2, 3, span{4, 5, 0}))
	f.Add(appendExtentKey(nil, 1, extentKey{1, 2, 3, 4, 5}))
	f.Add(appendLiveKey(nil, 1, 2, 3))
	f.Add(appendChunkKey(nil, 1, 2, 3))
	f.Fuzz(func(t *testing.T, p []byte) {
		if k, ok := decodeExtentKey(p); ok && !bytes.Equal(appendExtentKey(slices.Clone(p[:0]), localIn(p), k), p) {
			t.Fatalf("extent %x", p)
		}
		if v, g, s, ok := decodeMarkerKey(p); ok && len(p) > 4 && p[4] == kindMarker && !bytes.Equal(appendMarkerKey(nil, localIn(p), v, g, s), p) {
			t.Fatalf("marker %x", p)
		}
		decodeLiveKey(p)
		decodeChunkKey(p)
		decodeVolumeKey(p)
		decodeCatalogKey(p)
		decodeUsage(p)
		decodeVersion(p)
	})
}

func localIn(p []byte) localID {
	return localID(uint32(p[0])<<24 | uint32(p[1])<<16 | uint32(p[2])<<8 | uint32(p[3]))
}
