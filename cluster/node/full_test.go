package node_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/node"
	"firn.io/firn/cluster/transport/inproc"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/vfs"
)

// newSimLab is a lab of one node on a simulated disk.
func newSimLab(t *testing.T) (*lab, *vfs.Sim) {
	fs := vfs.NewSim(0)
	l := &lab{t: t, ctx: context.Background(), cluster: block.NewUUID(), meta: meta.NewMem(clock.System{}), fabric: inproc.NewFabric(nil), capacity: 64 << 20, age: 50 * time.Millisecond}
	l.add(1, func(m *machine) { m.fs, m.dir = fs, "/disk" })
	return l, fs
}

// fill gives all that is free in a file system to somebody else.
func fill(t *testing.T, fs *vfs.Sim) {
	t.Helper()
	sp, err := fs.Space("/")
	if err != nil {
		t.Fatal(err)
	}
	fs.SetCapacity(sp.TotalBytes - sp.FreeBytes)
}

// TestFullFileSystem: somebody else fills the file system of a disk to its last
// byte, and takes whatever becomes free. The disk has not failed: writes are
// refused after a while, reads go on; the node stops and starts meanwhile; and when
// there is room, writes go on by themselves.
func TestFullFileSystem(t *testing.T) {
	t.Parallel()
	l, fs := newSimLab(t)
	m := l.nodes[0]
	v := l.volume("demo", 64<<20)
	c := newClient(l)
	a := c.attach(v, 1)
	random := rand.New(rand.NewPCG(1, 2))
	want := map[block.Chunk]map[block.Index]int{}
	// try writes a block that was not written before.
	seed := 0
	try := func() wire.Status {
		t.Helper()
		ch, at := block.Chunk(random.IntN(16)), block.Index(random.IntN(block.BlocksPerChunk))
		if _, again := want[ch][at]; again {
			return wire.StatusOK
		}
		seed++
		p := pattern(seed, 1)
		g, _ := v.Group(ch)
		c.seqs[g]++
		got, ok := c.ask(1, wire.Request{Kind: wire.ReqPropose, Group: g, Layout: v.Layout, Command: wire.Command{
			Type: wire.CmdWrite, Cluster: l.cluster, Volume: v.ID, Epoch: 1, Nonce: 7, Generation: v.Generation, Layout: v.Layout,
			OpSeq: c.seqs[g], Floor: c.seqs[g], Chunk: ch, Block: at, Count: 1, PayloadBytes: block.Size, CRCs: block.AppendCRCs(nil, p)}}, p)
		if !ok {
			t.Fatal("a write is not answered")
		}
		if got.resp.Status != wire.StatusOK {
			c.seqs[g]--
			return got.resp.Status
		}
		if want[ch] == nil {
			want[ch] = map[block.Index]int{}
		}
		want[ch][at] = seed
		a.tokens[g] = max(a.tokens[g], got.resp.Result.Version)
		return wire.StatusOK
	}
	check := func(when string) {
		t.Helper()
		for ch, blocks := range want {
			for at, seed := range blocks {
				if got := a.read(1, ch, at, 1); !bytes.Equal(got, pattern(seed, 1)) {
					t.Fatalf("%s: chunk %d, block %d is wrong", when, ch, at)
				}
			}
		}
	}
	for range 200 {
		if st := try(); st != wire.StatusOK {
			t.Fatalf("a write while there is room: %v", st)
		}
	}

	fill(t, fs)
	var st wire.Status
	l.eventually("writes are refused", func() bool {
		fill(t, fs)
		st = try()
		return st != wire.StatusOK
	})
	l.eventually("no space is said", func() bool { fill(t, fs); return try() == wire.StatusNoSpace })
	full := func(when string) {
		t.Helper()
		got := m.diskAt(m.dir)
		if got.Failed != "" || got.Health.State != wire.DiskFull || !strings.Contains(got.Health.Reason, "file system") {
			t.Fatalf("%s: %q, %+v", when, got.Failed, got.Health)
		}
	}
	full("in a full file system")
	check("in a full file system")

	m.stop()
	m.start()
	full("after a start in a full file system")
	check("after a start in a full file system")
	if st := try(); st == wire.StatusOK {
		t.Error("a write is taken after a start in a full file system")
	}

	fs.SetCapacity(0)
	l.eventually("writes go on when there is room", func() bool { return try() == wire.StatusOK })
	for range 200 {
		l.eventually("a write is taken", func() bool { return try() == wire.StatusOK })
	}
	l.eventually("the disk is well again", func() bool {
		got := m.diskAt(m.dir)
		return got.Health.State == wire.DiskOK && got.Pending == 0
	})
	check("after all")
	m.stop()
	m.start()
	check("after another start")
	if s, _ := node.Snapshot(m.loop, m.node); s.Counters.CorruptReads != 0 {
		t.Errorf("%d corrupt reads", s.Counters.CorruptReads)
	}
}

// TestFailedSyncAtStartIsFinal: also a sync that fails while a disk opens takes it
// out for good (L8), whatever the reason is; of the log's files or of the index's.
func TestFailedSyncAtStartIsFinal(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		file string
		err  error
	}{
		{".seg", errors.New("input/output error")},
		{".seg", block.Errorf(block.NoSpace, "no space left on device")},
		{"MANIFEST", errors.New("input/output error")},
	} {
		l, fs := newSimLab(t)
		m := l.nodes[0]
		m.stop()
		fs.SetRule(func(c vfs.Call) error {
			if c.Op == vfs.OpSync && strings.Contains(c.Name, tc.file) {
				return tc.err
			}
			return nil
		})
		if err := m.tryStart(); err == nil {
			t.Fatalf("%s: the node starts", tc.file)
		}
		fs.SetRule(nil)
		if err := m.tryStart(); err == nil || !strings.Contains(err.Error(), "failed before") || !strings.Contains(err.Error(), "replace it") {
			t.Errorf("%s, %v: another start: %v", tc.file, tc.err, err)
		}
	}
}
