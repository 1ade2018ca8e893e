package node_test

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/node"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// outage is a cluster of three nodes whose logs are short, and one of which is
// to be away.
type outage struct {
	*lab
	v    meta.VolumeMeta
	c    *client
	a    *attached
	want map[block.Chunk][]byte
	away *machine
}

const outageBlocks = 256 // of each chunk

func newOutage(t *testing.T, copyBytes int64) *outage {
	t.Helper()
	return newOutageOf(t, 384<<20, 1<<20, copyBytes)
}

func newOutageOf(t *testing.T, capacity, logBytes, copyBytes int64) *outage {
	t.Helper()
	var dirs []string // they outlive the nodes
	for range 3 {
		dirs = append(dirs, t.TempDir())
	}
	l := newLabOf(t, 0, capacity, 100*time.Millisecond)
	t.Cleanup(func() {
		for _, m := range l.nodes {
			if t.Failed() && m.loop != nil {
				s, _ := node.Snapshot(m.loop, m.node)
				t.Logf("node %d: disk %+v, replicas %+v, counters %+v", m.id, s.Disks[0], s.Replicas, s.Counters)
			}
		}
	})
	l.logBytes, l.copyBytes = logBytes, copyBytes
	for i := range 3 {
		m := &machine{t: t, lab: l, id: block.NodeID(i + 1), dir: dirs[i]}
		l.nodes = append(l.nodes, m)
		m.start()
	}
	o := &outage{lab: l, v: l.volume("demo", 256<<20), want: map[block.Chunk][]byte{}, away: l.nodes[2]}
	o.c = newClient(l)
	o.a = o.c.attach(o.v, 1)
	for ch := range block.Chunk(24) {
		o.write(ch, int(ch))
	}
	return o
}

func (o *outage) write(ch block.Chunk, seed int) {
	o.t.Helper()
	o.want[ch] = pattern(seed, outageBlocks)
	o.a.write(ch, block.Index(ch), o.want[ch])
}

func (o *outage) trim(ch block.Chunk) {
	o.t.Helper()
	g, _ := o.v.Group(ch)
	o.c.seqs[g]++
	seq := o.c.seqs[g]
	got := o.c.must(wire.Request{Kind: wire.ReqPropose, Group: g, Layout: o.v.Layout, Command: wire.Command{
		Type: wire.CmdMark, Cluster: o.cluster, Volume: o.v.ID, Epoch: 1, Nonce: 7, Generation: o.v.Generation, Layout: o.v.Layout,
		OpSeq: seq, Floor: seq, Chunk: ch, ToChunk: ch + 1}}, nil)
	o.a.tokens[g] = max(o.a.tokens[g], got.resp.Result.Version)
	o.want[ch] = make([]byte, outageBlocks*block.Size)
}

func (o *outage) status(m *machine) node.Status {
	s, _ := node.Snapshot(m.loop, m.node)
	return s
}

// forget writes, with one node away, until the others' logs do not reach back
// to what it has.
func (o *outage) forget() {
	o.t.Helper()
	had := map[block.GroupID]uint64{}
	for _, r := range o.status(o.away).Replicas {
		had[r.Group] = r.Applied
	}
	o.away.stop()
	for ch := range block.Chunk(20) {
		switch ch % 4 {
		case 0:
			o.trim(ch)
		case 3:
			o.a.write(ch, block.Index(ch)+3, pattern(int(ch)+300, 2)) // a part of the chunk
			copy(o.want[ch][3*block.Size:], pattern(int(ch)+300, 2))
		default:
			o.write(ch, int(ch)+100)
		}
	}
	for ch := range block.Chunk(16) {
		o.write(30+ch, int(ch)+200)
	}
	round := 0
	o.eventually("the logs are truncated beyond the node that is away", func() bool {
		round++
		o.write(30+block.Chunk(round%16), round+1000)
		for _, m := range o.nodes[:2] {
			for _, r := range o.status(m).Replicas {
				if r.LogFirst <= had[r.Group]+1 && r.Applied > had[r.Group]+4 {
					return false
				}
			}
		}
		return true
	})
}

// caughtUp waits until the node that was away has what the others have.
func (o *outage) caughtUp() {
	o.t.Helper()
	for ch, p := range o.want {
		if got := o.a.read(o.away.id, ch, block.Index(ch), outageBlocks); !bytes.Equal(got, p) {
			o.t.Errorf("chunk %d is wrong on the node that was away", ch)
		}
	}
	o.eventually("all replicas have equal digests", func() bool {
		seen := map[string]uint64{}
		versions := map[block.GroupID]map[block.Version]bool{}
		for _, m := range o.nodes {
			var ds []node.Digest
			var err error
			m.loop.Call(func() { ds, err = m.node.Digests() })
			if err != nil {
				o.t.Fatal(err)
			}
			for _, d := range ds {
				if versions[d.Group] == nil {
					versions[d.Group] = map[block.Version]bool{}
				}
				versions[d.Group][d.Applied] = true
				at := fmt.Sprint(d.Group, d.Applied)
				if have, ok := seen[at]; ok && have != d.Sum {
					o.t.Fatalf("group %d at %v: digests %x and %x", d.Group, d.Applied, have, d.Sum)
				}
				seen[at] = d.Sum
			}
		}
		for _, vs := range versions {
			if len(vs) > 1 {
				return false
			}
		}
		return true
	})
	for _, m := range o.nodes {
		var err error
		m.loop.Call(func() { _, _, err = m.node.CheckLive(64) })
		if err != nil {
			o.t.Errorf("node %d: %v", m.id, err)
		}
	}
}

// A node that was away until all logs had forgotten what it needs is filled
// from chunk tables; only what changed travels.
func TestCatchUp(t *testing.T) {
	t.Parallel()
	o := newOutage(t, 0)
	o.forget()
	o.away.start()
	for ch := range block.Chunk(8) { // under load
		o.write(ch, int(ch)+500)
	}
	o.caughtUp()
	s := o.status(o.away)
	if s.Counters.CopiesDone == 0 || s.Counters.CopyBytesIn == 0 {
		t.Errorf("nothing was copied: %+v", s.Counters)
	}
	if all := uint64(len(o.want)) * outageBlocks * block.Size; s.Counters.CopyBytesIn > all {
		t.Errorf("%d bytes were copied of %d that there are", s.Counters.CopyBytesIn, all)
	}
	for _, r := range s.Replicas {
		if r.Copy != nil || !r.Open {
			t.Errorf("replica %+v", r)
		}
	}
	// It takes part again: with another node gone a majority needs it.
	o.nodes[0].stop()
	for ch := range block.Chunk(8) {
		o.write(ch, int(ch)+600)
	}
	o.nodes[0].start()
	o.caughtUp()
}

// copying waits until the node that is away has begun to replace chunks.
func (o *outage) copying() {
	o.t.Helper()
	o.eventually("a copy is under way", func() bool {
		for _, r := range o.status(o.away).Replicas {
			if r.Copy != nil && r.Copy.Total > 0 && r.Copy.Bytes > 0 {
				return true
			}
		}
		return false
	})
}

// The one that is filled restarts in the middle: it goes on where it was, and
// serves nothing before it is complete.
func TestCatchUpSurvivesTheReceiver(t *testing.T) {
	t.Parallel()
	o := newOutage(t, 8<<20)
	o.forget()
	o.away.start()
	for range 2 {
		o.copying()
		o.away.stop()
		o.away.start()
	}
	o.caughtUp()
}

// The one that gives goes away in the middle: another one is asked.
func TestCatchUpSurvivesTheSender(t *testing.T) {
	t.Parallel()
	o := newOutage(t, 8<<20)
	o.forget()
	o.away.start()
	o.copying()
	var from block.NodeID
	for _, r := range o.status(o.away).Replicas {
		if r.Copy != nil && r.Copy.Bytes > 0 {
			from = r.Copy.From
		}
	}
	if from == 0 {
		t.Fatal("a copy from nobody")
	}
	o.nodes[from-1].stop()
	o.settled()
	o.nodes[from-1].start()
	o.caughtUp()
}

// settled waits until no copy is under way any more, with one node gone.
func (o *outage) settled() {
	o.t.Helper()
	o.eventually("the copies are complete without their first sender", func() bool {
		for _, r := range o.status(o.away).Replicas {
			if r.Copy != nil || !r.Open {
				return false
			}
		}
		return true
	})
}

// With one node of three gone, small disks that are overwritten again and again
// do not fill with what only that node would need.
func TestNodeDownDoesNotFillTheOthers(t *testing.T) {
	t.Parallel()
	o := newOutageOf(t, 96<<20, 0, 0)
	o.away.stop()
	for i := range 4 {
		for ch := range block.Chunk(24) {
			o.write(ch, 100*i+int(ch))
		}
	}
	for _, m := range o.nodes[:2] {
		if s := o.status(m); s.Counters.NoSpace > 0 || s.Disks[0].Failed != "" {
			t.Errorf("node %d: %+v", m.id, s.Disks[0])
		}
	}
	o.away.start()
	o.caughtUp()
}
