package meta

import (
	"errors"
	"strings"
	"testing"

	"firn.io/firn/internal/block"
)

func sampleVolume() VolumeMeta {
	return VolumeMeta{ID: block.VolumeID{1}, Name: "demo", SizeBytes: 3 << 40, BlockSize: 512, Replicas: 3, Generation: 1, Epoch: 7,
		Settings: 2, State: Ready, Spans: [][]block.GroupID{{1, 2, 3, 4}, {3, 4, 5, 6}, {1, 2, 5, 6}}, Layout: 3}
}

func sampleGroup() GroupMeta {
	return GroupMeta{ID: 9, Era: 1, Replicas: []ReplicaMeta{{Node: 1, Disk: block.DiskID{1}, Replica: 1, Created: true}, {Node: 2, Disk: block.DiskID{2}, Replica: 2}}}
}

func TestTheLargestVolumeFitsACommand(t *testing.T) {
	v := sampleVolume()
	v.Name, v.Waiting, v.SizeBytes = strings.Repeat("n", MaxVolumeName), strings.Repeat("w", 200), MaxVolumeBytes
	v.Spans = nil
	for range MaxSpans {
		span := make([]block.GroupID, MaxWidth)
		for i := range span {
			span[i] = 999_999
		}
		v.Spans = append(v.Spans, span)
	}
	const maxVolumeValueBytes = 128 << 10 // wire.MaxVolumeValueBytes
	if n := len(EncodeVolume(v)); n > maxVolumeValueBytes {
		t.Fatalf("a volume of %d TiB takes %d bytes", MaxVolumeBytes>>40, n)
	}
	if _, err := DecodeVolume(KV{Key: "k", Value: EncodeVolume(v)}); err != nil {
		t.Fatal(err)
	}
}

func TestChunksAreSpreadOverTheirSpansGroups(t *testing.T) {
	v := sampleVolume()
	for _, c := range []struct {
		chunk block.Chunk
		group block.GroupID
	}{{0, 1}, {1, 2}, {5, 2}, {block.ChunksPerSpan, 3}, {block.ChunksPerSpan + 3, 6}, {3*block.ChunksPerSpan - 1, 6}} {
		if g, ok := v.Group(c.chunk); !ok || g != c.group {
			t.Errorf("chunk %d is in group %d", c.chunk, g)
		}
	}
	if _, ok := v.Group(3 * block.ChunksPerSpan); ok {
		t.Error("a chunk beyond the spans has a group")
	}
	if got := v.Groups(); len(got) != 6 {
		t.Errorf("groups %v", got)
	}
	if SpansFor(1) != 1 || SpansFor(block.SpanBytes) != 1 || SpansFor(block.SpanBytes+512) != 2 {
		t.Error("SpansFor")
	}
}

func TestDecodersRefuse(t *testing.T) {
	cases := []struct{ value, text string }{
		{"", "does not decode"},
		{"{", "does not decode"},
		{"[]", "does not decode"},
		{`{}`, "no format version"},
		{`{"v":2}`, "upgrade"},
		{`{"v":1}`, ""},
		{strings.Repeat(" ", MaxValueBytes+1), "bytes"},
	}
	for _, c := range cases {
		kv := KV{Key: "k", Value: []byte(c.value)}
		for name, err := range decodeAll(kv) {
			if c.value == `{"v":1}` {
				continue
			}
			if err == nil || !strings.Contains(err.Error(), c.text) || !errors.Is(err, block.Corrupt) && !errors.Is(err, block.Unsupported) {
				t.Errorf("%s of %.20q: %v", name, c.value, err)
			}
		}
	}
}

func decodeAll(kv KV) map[string]error {
	out := map[string]error{}
	_, out["volume"] = DecodeVolume(kv)
	_, out["group"] = DecodeGroup(kv)
	_, out["node"] = DecodeNode(kv)
	_, out["live"] = DecodeLive(kv)
	_, out["owner"] = DecodeOwner(kv)
	_, out["gateway"] = DecodeGateway(kv)
	_, out["cluster"] = DecodeCluster(kv)
	_, out["leader"] = DecodeLeader(kv)
	return out
}

func FuzzDecode(f *testing.F) {
	f.Add(EncodeVolume(sampleVolume()))
	f.Add(EncodeGroup(sampleGroup()))
	f.Add(EncodeNode(NodeMeta{ID: 1, Addr: "a", Disks: []DiskMeta{{ID: block.DiskID{1}, CapacityBytes: 1}}}))
	f.Add(encode(OwnerMeta{V: 1, Gateway: "g", Nonce: 1 << 63}))
	f.Add(encode(ClusterMeta{V: 1, ID: block.ClusterID{1}}))
	f.Add([]byte("18446744073709551616"))
	f.Fuzz(func(t *testing.T, b []byte) {
		kv := KV{Key: "k", Value: b}
		decodeAll(kv)
		if v, err := DecodeVolume(kv); err == nil {
			for _, c := range []block.Chunk{0, 1, block.ChunksPerSpan, 1<<32 - 1} {
				v.Group(c)
			}
			again, err := DecodeVolume(KV{Key: "k", Value: EncodeVolume(v)})
			if err != nil || string(EncodeVolume(again)) != string(EncodeVolume(v)) {
				t.Fatalf("%+v does not survive its encoding: %v", v, err)
			}
		}
		if g, err := DecodeGroup(kv); err == nil {
			if _, err := DecodeGroup(KV{Key: "k", Value: EncodeGroup(g)}); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := decodeCounter(KV{Key: "k", Value: b, Modified: 1}); err != nil && block.KindOf(err) != block.Corrupt {
			t.Fatal(err)
		}
	})
}

func FuzzKeys(f *testing.F) {
	f.Add(NodeKey(7))
	f.Add(GroupKey(1 << 63))
	f.Add(VolumeKey(block.VolumeID{3}))
	f.Add("demo-1.x")
	f.Fuzz(func(t *testing.T, s string) {
		if id, err := ParseNodeKey(s); err == nil && id == 0 {
			t.Fatal("node 0")
		}
		if id, err := ParseGroupKey(s); err == nil && id == 0 {
			t.Fatal("group 0")
		}
		if id, err := ParseVolumeKey(s); err == nil && !strings.EqualFold(VolumeKey(id)[len(VolumesPrefix):], s[len(s)-36:]) {
			t.Fatalf("%q became %v", s, id)
		}
		if CheckVolumeName(s) == nil && (strings.ContainsAny(s, "/\x00 _") || strings.ToLower(s) != s || len(s) > MaxVolumeName) {
			t.Fatalf("%q passed", s)
		}
	})
}
