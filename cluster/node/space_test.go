package node

import (
	"reflect"
	"testing"

	"firn.io/firn/internal/block"
)

func TestSpaceReport(t *testing.T) {
	for _, disks := range [][]diskSpace{
		{},
		{{disk: block.DiskID{1}, size: 1 << 40, taken: 5}},
		{{disk: block.DiskID{1}, size: 7, taken: 7}, {disk: block.DiskID{2}}},
	} {
		p := appendSpace(nil, disks)
		got, err := decodeSpace(p)
		if err != nil || len(got) != len(disks) || len(disks) > 0 && !reflect.DeepEqual(got, disks) {
			t.Errorf("%v came back as %v, %v", disks, got, err)
		}
		for n := range p {
			if _, err := decodeSpace(p[:n]); err == nil {
				t.Errorf("%d of %d bytes decode", n, len(p))
			}
		}
	}
}

func FuzzSpaceReport(f *testing.F) {
	f.Add([]byte{})
	f.Add(appendSpace(nil, []diskSpace{{disk: block.DiskID{1}, size: 9, taken: 3}}))
	f.Add([]byte{spaceVersion, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, p []byte) {
		disks, err := decodeSpace(p)
		if err == nil && string(appendSpace(nil, disks)) != string(p) {
			t.Errorf("%x encodes to %x", p, appendSpace(nil, disks))
		}
	})
}
