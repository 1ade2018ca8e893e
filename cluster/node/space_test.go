package node

import (
	"reflect"
	"testing"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/payload"
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

type answersOf struct {
	transport.Peer
	got map[wire.Status]int
}

func (a *answersOf) Send(_ transport.Class, m transport.Message) bool {
	var resp wire.Response
	if wire.DecodeResponse(m.Header, &resp) == nil {
		a.got[resp.Status]++
	}
	m.Release()
	return true
}

// Writes that wait because the disk is nearly full hold a bounded amount of
// memory: those beyond it are told to come again.
func TestDelayedWritesAreBounded(t *testing.T) {
	world := loop.NewWorld(1)
	l := world.NewLoop(nil)
	n := &Node{loop: l}
	n.space, n.orders = newSpace(n), newOrders(n)
	disk := &disk{node: n, id: block.DiskID{7}}
	n.space.known[disk.id] = diskSpace{disk: disk.id, size: 1000, taken: 880}
	rep := &replica{disk: disk}
	peer := &answersOf{got: map[wire.Status]int{}}
	const writes = 2 * maxDelayedBytes / (256 * block.Size)
	l.Post(func() {
		for range writes {
			n.replicate(&op{node: n, peer: peer, req: &wire.Request{Kind: wire.ReqPropose}, rep: rep}, payload.New(256*block.Size))
		}
		if n.space.delayed > maxDelayedBytes {
			t.Errorf("%d bytes wait", n.space.delayed)
		}
	})
	world.RunFor(maxDelay)
	if peer.got[wire.StatusBusy] != writes/2 || peer.got[wire.StatusNotReady] != writes/2 || n.space.delayed != 0 {
		t.Errorf("answers %v, %d bytes still wait", peer.got, n.space.delayed)
	}
}
