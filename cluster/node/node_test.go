package node_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"firn.io/firn/cluster/coordinator"
	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/index/pebblestore"
	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/node"
	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/transport/inproc"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/payload"
	"firn.io/firn/internal/vfs"
	"firn.io/firn/internal/vfs/pebblefs"
)

// machine is one node on a loop of its own, over a real folder and Pebble.
type machine struct {
	t    *testing.T
	lab  *lab
	id   block.NodeID
	dir  string
	loop *loop.System
	fs   vfs.FS
	// sharing is DiskConfig.Sharing.
	sharing int
	// second is the folder of another disk; optional.
	second string
	node   *node.Node
	cand   *coordinator.Coordinator
}

// lab is three machines, a metadata server and a client.
type lab struct {
	absentAfter time.Duration // see coordinator.Config
	t           *testing.T
	ctx         context.Context
	cluster     block.ClusterID
	meta        *meta.Mem
	fabric      *inproc.Fabric
	nodes       []*machine
	// capacity is what each disk may fill, in bytes.
	capacity int64
	age      time.Duration // of what is not checkpointed
	// logBytes and copyBytes are node.Pace's LogBytes and CopyBytes.
	logBytes, copyBytes int64
	logf                func(format string, args ...any) // besides the test's log; optional
}

func newLab(t *testing.T, nodes int) *lab {
	t.Helper()
	return newLabOf(t, nodes, 256<<20, 300*time.Millisecond)
}

func newLabOf(t *testing.T, nodes int, capacity int64, age time.Duration) *lab {
	t.Helper()
	l := &lab{t: t, ctx: context.Background(), cluster: block.NewUUID(), meta: meta.NewMem(clock.System{}), fabric: inproc.NewFabric(nil), capacity: capacity, age: age}
	l.add(nodes, func(*machine) {})
	return l
}

// add starts nodes, after change.
func (l *lab) add(nodes int, change func(*machine)) {
	l.t.Helper()
	for i := range nodes {
		m := &machine{t: l.t, lab: l, id: block.NodeID(i + 1), dir: l.t.TempDir()}
		change(m)
		l.nodes = append(l.nodes, m)
		m.start()
	}
	l.t.Cleanup(func() {
		for _, m := range l.nodes {
			if m.loop != nil {
				m.stop()
			}
		}
	})
}

func (m *machine) start() {
	m.t.Helper()
	if err := m.tryStart(); err != nil {
		m.t.Fatal(err)
	}
}

// tryStart starts the node, or returns why it does not start.
func (m *machine) tryStart() error {
	m.loop = loop.NewSystem(clock.System{}, loop.DefaultLimits)
	addr := fmt.Sprintf("node%d", m.id)
	if m.fs == nil {
		m.fs = vfs.NewOS()
	}
	disks := []node.DiskConfig{{Dir: m.dir, CapacityBytes: m.lab.capacity, Sharing: m.sharing}}
	if m.second != "" {
		disks = append(disks, node.DiskConfig{Dir: m.second, CapacityBytes: m.lab.capacity})
	}
	n, err := node.Run(m.lab.ctx, m.loop, node.Config{
		ID: m.id, Cluster: m.lab.cluster, Listen: addr, Boot: "boot", FS: m.fs, Disks: disks,
		OpenStore: func(dir string, room *vfs.Reserve) (index.Store, error) {
			return pebblestore.Open(dir, pebblestore.Options{FS: pebblefs.New(m.fs, vfs.ClassIndex), Room: room, CacheBytes: 1 << 20, MemTableBytes: 1 << 20})
		},
		Network:     m.lab.fabric.Network(addr, m.loop, transport.Identity{Hello: transport.Hello{Cluster: m.lab.cluster, Node: m.id}}),
		Meta:        m.lab.meta.Client(),
		Incarnation: uint64(m.loop.Rand().Int64()),
		NewDiskID:   func() block.DiskID { return block.NewUUID() },
		Pace: node.Pace{SegmentBytes: 4 << 20, CheckpointAge: m.lab.age, Upkeep: 20 * time.Millisecond,
			LogBytes: m.lab.logBytes, CopyBytes: m.lab.copyBytes},
		Logf: func(format string, args ...any) {
			m.t.Logf(addr+": "+format, args...)
			if m.lab.logf != nil {
				m.lab.logf(format, args...)
			}
		},
	})
	if err != nil {
		m.loop.Stop()
		m.loop = nil
		return err
	}
	m.node = n
	m.loop.Call(func() {
		m.cand = coordinator.New(coordinator.Config{Loop: m.loop, Store: m.lab.meta.Client(), Node: m.id, Deleter: nobody{}, AbsentAfter: m.lab.absentAfter})
		m.cand.Start(m.lab.ctx)
	})
	return nil
}

// nobody deletes nothing: these tests delete no volumes.
type nobody struct{}

func (nobody) DeleteInGroup(context.Context, meta.VolumeMeta, block.GroupID, func(error)) {
	panic("no volume is deleted here")
}

func (m *machine) stop() {
	m.t.Helper()
	gone := make(chan struct{})
	m.loop.Post(func() { m.cand.Stop(func() { close(gone) }) })
	<-gone
	ctx, cancel := context.WithTimeout(m.lab.ctx, 20*time.Second)
	defer cancel()
	if err := node.Shutdown(ctx, m.loop, m.node); err != nil {
		m.t.Errorf("stop of node %d: %v", m.id, err)
	}
	m.loop.Stop()
	m.loop, m.node = nil, nil
}

// eventually waits until cond holds, which is asked again whenever a tick of
// upkeep may have changed something.
func (l *lab) eventually(what string, cond func() bool) {
	l.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		if time.Now().After(deadline) {
			l.t.Fatalf("not within 20 s: %s", what)
		}
		<-tick.C
	}
}

// volume creates a volume and waits until it has groups.
func (l *lab) volume(name string, size int64) meta.VolumeMeta {
	l.t.Helper()
	store := l.meta.Client()
	var v meta.VolumeMeta
	var err error
	l.eventually("a volume can be created", func() bool {
		v, err = meta.CreateVolume(l.ctx, store, meta.NewVolume{ID: block.NewUUID(), Name: name, SizeBytes: size, Replicas: min(3, len(l.nodes)) | 1})
		return err == nil
	})
	l.eventually("the volume is ready", func() bool {
		v, err = meta.GetVolume(l.ctx, store, v.ID)
		return err == nil && v.State == meta.Ready
	})
	return v
}

// client speaks the protocol with one node at a time.
type client struct {
	l     *lab
	loop  *loop.System
	net   transport.Network
	peers map[block.NodeID]transport.Peer
	next  uint64
	wait  map[uint64]chan answer
	seqs  map[block.GroupID]block.OpSeq
}

type answer struct {
	resp wire.Response
	data []byte
}

func newClient(l *lab) *client {
	c := &client{l: l, loop: loop.NewSystem(clock.System{}, loop.DefaultLimits), peers: map[block.NodeID]transport.Peer{},
		wait: map[uint64]chan answer{}, seqs: map[block.GroupID]block.OpSeq{}}
	c.net = l.fabric.Network("client", c.loop, transport.Identity{Hello: transport.Hello{Cluster: l.cluster}})
	l.t.Cleanup(c.loop.Stop)
	return c
}

// Receive implements transport.Handler.
func (c *client) Receive(_ transport.Peer, m transport.Message) {
	defer m.Release()
	var a answer
	if err := wire.DecodeResponse(m.Header, &a.resp); err != nil {
		c.l.t.Error(err)
		return
	}
	for _, p := range m.Payloads {
		a.data = append(a.data, p.Bytes()...)
	}
	if ch := c.wait[a.resp.ID]; ch != nil {
		delete(c.wait, a.resp.ID)
		ch <- a
	}
}

// Closed implements transport.Handler.
func (c *client) Closed(transport.Peer, error) {}

// ask sends one request to one node and returns its answer, ok=false if none came.
func (c *client) ask(to block.NodeID, q wire.Request, data []byte) (answer, bool) {
	ch := make(chan answer, 1)
	c.loop.Post(func() {
		c.next++
		q.ID = c.next
		c.wait[q.ID] = ch
		p := c.peers[to]
		if p == nil {
			p = c.net.Dial(c.l.ctx, fmt.Sprintf("node%d", to), c)
			c.peers[to] = p
		}
		m := transport.Message{Type: transport.TypeRequest, Header: wire.AppendRequest(nil, &q)}
		if data != nil {
			m.Payloads = []*payload.Buf{payload.Copy(data)}
		}
		p.Send(transport.Data, m)
	})
	select {
	case a := <-ch:
		return a, true
	case <-time.After(2 * time.Second):
		return answer{}, false
	}
}

// must asks the nodes in turn until one answers with StatusOK.
func (c *client) must(q wire.Request, data []byte) answer {
	c.l.t.Helper()
	var got answer
	turn := 0
	c.l.eventually(fmt.Sprintf("request of kind %d in group %d is answered", q.Kind, q.Group), func() bool {
		m := c.l.nodes[turn%len(c.l.nodes)]
		turn++
		if m.loop == nil {
			return false
		}
		a, ok := c.ask(m.id, q, data)
		got = a
		return ok && a.resp.Status == wire.StatusOK
	})
	return got
}

// attached is a volume that the client has fenced.
type attached struct {
	c      *client
	v      meta.VolumeMeta
	epoch  block.Epoch
	tokens map[block.GroupID]block.Version
}

func (c *client) attach(v meta.VolumeMeta, epoch block.Epoch) *attached {
	c.l.t.Helper()
	a := &attached{c: c, v: v, epoch: epoch, tokens: map[block.GroupID]block.Version{}}
	v.Epoch = epoch
	for _, g := range v.Groups() {
		got := c.must(wire.Request{Kind: wire.ReqPropose, Group: g, Layout: v.Layout, Command: wire.Command{
			Type: wire.CmdFence, Cluster: c.l.cluster, Volume: v.ID, Epoch: epoch, Nonce: 7, Generation: v.Generation, Layout: v.Layout,
			Size: v.SizeBytes, Settings: v.Settings, VolumeValue: meta.EncodeVolume(v)}}, nil)
		if got.resp.Result.Outcome != wire.OutcomeApplied {
			c.l.t.Fatalf("fence in group %d: %+v", g, got.resp.Result)
		}
		a.tokens[g] = got.resp.Result.Version
		c.seqs[g] = 0
	}
	return a
}

func (a *attached) write(ch block.Chunk, at block.Index, data []byte) {
	a.c.l.t.Helper()
	g, _ := a.v.Group(ch)
	a.c.seqs[g]++
	seq := a.c.seqs[g]
	got := a.c.must(wire.Request{Kind: wire.ReqPropose, Group: g, Layout: a.v.Layout, Command: wire.Command{
		Type: wire.CmdWrite, Cluster: a.c.l.cluster, Volume: a.v.ID, Epoch: a.epoch, Nonce: 7, Generation: a.v.Generation, Layout: a.v.Layout,
		OpSeq: seq, Floor: seq, Chunk: ch, Block: at, Count: uint16(len(data) / block.Size), PayloadBytes: uint32(len(data)),
		CRCs: block.AppendCRCs(nil, data)}}, data)
	if got.resp.Result.Outcome != wire.OutcomeApplied {
		a.c.l.t.Fatalf("write of chunk %d: %+v", ch, got.resp.Result)
	}
	a.tokens[g] = max(a.tokens[g], got.resp.Result.Version)
}

func (a *attached) request(kind wire.RequestKind, ch block.Chunk) wire.Request {
	g, _ := a.v.Group(ch)
	return wire.Request{Kind: kind, Group: g, Layout: a.v.Layout, Volume: a.v.ID, Epoch: a.epoch, Nonce: 7,
		Generation: block.GenerationLatest, Chunk: ch, ToChunk: ch + 1, Token: a.tokens[g]}
}

// read reads from one node, waiting until it has caught up.
func (a *attached) read(from block.NodeID, ch block.Chunk, at block.Index, count uint16) []byte {
	a.c.l.t.Helper()
	q := a.request(wire.ReqRead, ch)
	q.Block, q.Count = at, count
	var got answer
	a.c.l.eventually(fmt.Sprintf("node %d answers a read of chunk %d", from, ch), func() bool {
		var ok bool
		got, ok = a.c.ask(from, q, nil)
		return ok && got.resp.Status == wire.StatusOK
	})
	if got.resp.Applied < q.Token {
		a.c.l.t.Errorf("a view at %v answered a read with token %v", got.resp.Applied, q.Token)
	}
	var out []byte
	data, crcs := got.data, got.resp.CRCs
	for _, r := range got.resp.Runs {
		n := int(r.Count) * block.Size
		if r.State != block.Data {
			out = append(out, make([]byte, n)...)
			continue
		}
		for i, want := range block.AppendCRCs(nil, data[:n]) {
			if crcs[i] != want {
				a.c.l.t.Errorf("chunk %d: block %d of the answer fails its checksum", ch, i)
			}
		}
		out, data, crcs = append(out, data[:n]...), data[n:], crcs[r.Count:]
	}
	return out
}

func pattern(seed, blocks int) []byte {
	p := make([]byte, blocks*block.Size)
	for i := range p {
		p[i] = byte(i*7 + i/251 + seed*31)
	}
	return p
}

func TestThreeNodes(t *testing.T) {
	t.Parallel()
	l := newLab(t, 3)
	v := l.volume("demo", 64<<20)
	c := newClient(l)
	a := c.attach(v, 1)

	want := map[block.Chunk][]byte{}
	for ch := range block.Chunk(16) {
		want[ch] = pattern(int(ch), 1+int(ch)*8)
		a.write(ch, block.Index(ch), want[ch])
	}
	check := func(when string) {
		t.Helper()
		for ch, p := range want {
			for _, m := range l.nodes {
				if got := a.read(m.id, ch, block.Index(ch), uint16(len(p)/block.Size)); !bytes.Equal(got, p) {
					t.Errorf("%s: chunk %d is wrong on node %d", when, ch, m.id)
				}
			}
		}
	}
	check("after the writes")

	q := a.request(wire.ReqMap, 3)
	if got := c.must(q, nil).resp; len(got.Runs) != 1 || got.Runs[0].Block != 3 || got.Runs[0].Count != 25 || got.Covered != 4 {
		t.Errorf("map of chunk 3: %+v", got)
	}
	if got := c.must(a.request(wire.ReqRecord, 3), nil).resp.Result.Record; got.Epoch != 1 || got.Nonce != 7 || got.Size != v.SizeBytes {
		t.Errorf("record: %+v", got)
	}

	// One node after the other goes down in order and comes back; writes go on.
	for i, m := range l.nodes {
		m.stop()
		for ch := range block.Chunk(8) {
			want[ch] = pattern(100*(i+1)+int(ch), len(want[ch])/block.Size)
			a.write(ch, block.Index(ch), want[ch])
		}
		m.start()
		check(fmt.Sprintf("after node %d came back", m.id))
	}

	// A newer attachment: the old one neither reads nor writes.
	b := c.attach(v, 2)
	old := a.request(wire.ReqRead, 1)
	old.Count, old.Token = 1, b.tokens[old.Group]
	for _, m := range l.nodes {
		l.eventually("the old attachment is fenced", func() bool {
			got, ok := c.ask(m.id, old, nil)
			return ok && got.resp.Status == wire.StatusFenced
		})
	}
	a = b
	check("after a new attachment")

	l.eventually("checkpoints truncate the logs", func() bool {
		for _, m := range l.nodes {
			s, _ := node.Snapshot(m.loop, m.node)
			for _, r := range s.Replicas {
				if r.LogFirst <= 11 && r.Applied > 12 {
					return false
				}
			}
		}
		return true
	})
}

// A replica that was acknowledged and is not on its disk is lost, never made again.
func TestLostReplica(t *testing.T) {
	t.Parallel()
	l := newLab(t, 3)
	v := l.volume("demo", 16<<20)
	c := newClient(l)
	a := c.attach(v, 1)
	a.write(0, 0, pattern(1, 4))

	m := l.nodes[1]
	m.stop()
	if err := os.RemoveAll(m.dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(m.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	m.start() // with a new disk: its id is another one
	a.write(0, 0, pattern(2, 4))
	if got := a.read(1, 0, 0, 4); !bytes.Equal(got, pattern(2, 4)) {
		t.Error("the group of two does not serve")
	}
	s, _ := node.Snapshot(m.loop, m.node)
	if len(s.Replicas) != 0 {
		t.Errorf("a wiped node made replicas again: %+v", s.Replicas)
	}
}

func TestSingleNode(t *testing.T) {
	t.Parallel()
	l := newLab(t, 1)
	v := l.volume("solo", 16<<20)
	c := newClient(l)
	a := c.attach(v, 1)
	p := pattern(5, 256)
	a.write(2, 17, p)
	l.nodes[0].stop()
	l.nodes[0].start()
	if got := a.read(1, 2, 17, 256); !bytes.Equal(got, p) {
		t.Error("a restart changed the data")
	}
}

// A volume that is overwritten again and again in random order fits a disk of
// three times its size: collection goes on after its first runs, and what it
// moved is let go of when nothing else is applied.
func TestOverwrite(t *testing.T) {
	t.Parallel()
	const volume = 16 << 20
	l := newLabOf(t, 1, 3*volume, 300*time.Millisecond)
	v := l.volume("churn", volume)
	c := newClient(l)
	a := c.attach(v, 1)

	const pieceBlocks = 64
	random := rand.New(rand.NewPCG(1, 2))
	seeds := make([]int, volume/block.Size/pieceBlocks)
	at := func(piece int) (block.Chunk, block.Index) {
		b := piece * pieceBlocks
		return block.Chunk(b / block.BlocksPerChunk), block.Index(b % block.BlocksPerChunk)
	}
	for i := range 10 * len(seeds) {
		piece := random.IntN(len(seeds))
		seeds[piece] = i + 1
		ch, b := at(piece)
		// Some blocks of each piece live longer than the rest.
		a.write(ch, b+block.Index(i%8), pattern(seeds[piece], pieceBlocks)[i%8*block.Size:])
		if i%8 != 0 {
			a.write(ch, b, pattern(seeds[piece], i%8))
		}
	}
	for piece, seed := range seeds {
		if seed == 0 {
			continue
		}
		ch, b := at(piece)
		if got := a.read(1, ch, b, pieceBlocks); !bytes.Equal(got, pattern(seed, pieceBlocks)) {
			t.Fatalf("piece %d does not hold its last write", piece)
		}
	}
}

// Trims on a full disk make room at once, however many they are and however
// long a checkpoint would wait otherwise.
func TestTrimMakesRoom(t *testing.T) {
	t.Parallel()
	l := newLabOf(t, 1, 48<<20, time.Hour)
	v := l.volume("full", 1<<30)
	c := newClient(l)
	a := c.attach(v, 1)

	command := func(kind wire.CommandType, ch block.Chunk) wire.Request {
		g, _ := v.Group(ch)
		c.seqs[g]++
		return wire.Request{Kind: wire.ReqPropose, Group: g, Layout: v.Layout, Command: wire.Command{
			Type: kind, Cluster: l.cluster, Volume: v.ID, Epoch: 1, Nonce: 7, Generation: v.Generation, Layout: v.Layout,
			OpSeq: c.seqs[g], Floor: c.seqs[g], Chunk: ch}}
	}
	const blocks = 64
	p := pattern(1, blocks)
	full := block.Chunk(0)
	for ; ; full++ {
		q := command(wire.CmdWrite, full)
		q.Command.Count, q.Command.PayloadBytes, q.Command.CRCs = blocks, blocks*block.Size, block.AppendCRCs(nil, p)
		got, ok := c.ask(1, q, p)
		if ok && (got.resp.Status == wire.StatusNoSpace || got.resp.Status == wire.StatusBusy) {
			g, _ := v.Group(full)
			c.seqs[g]--
			if got.resp.Status == wire.StatusBusy {
				full-- // the same again, until the disk has been full for long
				continue
			}
			wantFull(t, c)
			break
		}
		if !ok || got.resp.Status != wire.StatusOK || full == 200 {
			t.Fatalf("write of chunk %d: %v, %+v", full, ok, got.resp)
		}
	}
	for ch := range block.Chunk(1 << 30 / block.ChunkBytes) {
		q := command(wire.CmdMark, ch)
		q.Command.ToChunk = ch + 1
		if got := c.must(q, nil); got.resp.Result.Outcome != wire.OutcomeApplied {
			t.Fatalf("trim of chunk %d: %+v", ch, got.resp.Result)
		}
	}
	for ch := range full {
		a.write(ch, 0, p)
	}
	for ch := range full {
		if got := a.read(1, ch, 0, blocks); !bytes.Equal(got, p) {
			t.Errorf("chunk %d does not hold its last write", ch)
		}
	}
}

// wantFull asks the node how it is: its disk refuses writes, and it says so.
func wantFull(t *testing.T, c *client) {
	t.Helper()
	got, ok := c.ask(1, wire.Request{Kind: wire.ReqHealth}, nil)
	h, err := wire.DecodeHealth(got.resp.Health)
	if !ok || err != nil || len(h.Disks) != 1 || h.Halted != 0 || h.Replicas == 0 {
		t.Fatalf("health %+v, %v, %v", h, ok, err)
	}
	if d := h.Disks[0]; d.State != wire.DiskFull || d.Reason == "" || d.Percent() < 90 || d.LiveBytes == 0 {
		t.Fatalf("a disk that refuses writes says %+v", d)
	}
}

// smallFS is a file system of a size of its own.
type smallFS struct {
	vfs.FS
	space vfs.Space
}

func (f smallFS) Space(string) (vfs.Space, error) { return f.space, nil }

// What a disk may fill by default leaves room for its index and for others,
// and lets it start in a full file system.
func TestDefaultCapacity(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name        string
		total, free int64
		sharing     int
		want        int64
	}{
		{"empty", 1000 << 20, 1000 << 20, 0, 900 << 20},
		{"shared", 1000 << 20, 700 << 20, 3, 200 << 20},
		{"large", 1 << 40, 1 << 40, 1, 1<<40 - 4<<30},
		{"filled by others", 1000 << 20, 1 << 20, 1, 32 << 20},
	} {
		l := &lab{t: t, ctx: context.Background(), cluster: block.ClusterID{9}, meta: meta.NewMem(clock.System{}), fabric: inproc.NewFabric(nil), age: time.Hour}
		m := &machine{t: t, lab: l, id: 1, dir: t.TempDir(), fs: smallFS{vfs.NewOS(), vfs.Space{TotalBytes: tc.total, FreeBytes: tc.free}}, sharing: tc.sharing}
		m.start()
		s, _ := node.Snapshot(m.loop, m.node)
		if got := s.Disks[0].SizeBytes; got != tc.want {
			t.Errorf("%s: %d MiB, want %d", tc.name, got>>20, tc.want>>20)
		}
		m.stop()
	}
}
