package cluster

import (
	"bytes"
	"context"
	"testing"
	"time"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/payload"
)

// asked is one request that reached a node, and its way back.
type asked struct {
	node  block.NodeID
	req   wire.Request
	data  []byte // of a command's payload
	bytes []byte // the encoded command
	reply func(s wire.Response, bufs ...*payload.Buf)
}

// scripted is a client, in the simulator, whose nodes do what a script says. What
// the script does not take, they answer as a cluster at peace would: Fences by
// F2, everything else at once, by the group's leader. What apply does with content
// operations is not modelled here; test/sim runs real nodes.
type scripted struct {
	*loop.World
	t      *testing.T
	loop   *loop.Sim
	mem    *meta.Mem
	store  *meta.MemClient
	client *Client
	vol    meta.VolumeMeta

	groups map[block.GroupID]*scriptedGroup
	log    []asked
	// script takes a request if it returns true.
	script func(a asked) bool
	silent map[block.NodeID]bool
	peers  []*scriptedPeer
}

type scriptedGroup struct {
	leader block.NodeID
	index  uint64
	record wire.VolumeRecord
	known  bool
}

const testGroups = 4

var testCluster = block.ClusterID{0xcc}

func newScripted(t *testing.T, size int64) *scripted {
	w := loop.NewWorld(uint64(size))
	s := &scripted{World: w, t: t, loop: w.NewLoop(nil), groups: map[block.GroupID]*scriptedGroup{}, silent: map[block.NodeID]bool{}}
	s.mem = meta.NewMem(w.NewLoop(nil))
	s.mem.Drive(w.NewLoop(nil))
	s.store = s.mem.Client()
	var ops []meta.Op
	var ids []block.GroupID
	for n := block.NodeID(1); n <= 3; n++ {
		ops = append(ops, meta.Put(meta.NodeKey(n), meta.EncodeNode(meta.NodeMeta{ID: n, Addr: string(rune('0' + n))}), 0))
	}
	for g := block.GroupID(1); g <= 2*testGroups; g++ {
		m := meta.GroupMeta{ID: g}
		for n := block.NodeID(1); n <= 3; n++ {
			m.Replicas = append(m.Replicas, meta.ReplicaMeta{Node: n, Disk: block.DiskID{byte(n)}, Replica: block.ReplicaID(n), Created: true})
		}
		ops = append(ops, meta.Put(meta.GroupKey(g), meta.EncodeGroup(m), 0))
		s.groups[g] = &scriptedGroup{leader: block.NodeID(g%3) + 1, index: 10}
		if g <= testGroups {
			ids = append(ids, g)
		}
	}
	s.vol = meta.VolumeMeta{ID: block.VolumeID{7}, Name: "vol", SizeBytes: size, BlockSize: 512, Replicas: 3, Generation: 1, Settings: 1,
		State: meta.Ready, Layout: 1}
	for range meta.SpansFor(size) {
		s.vol.Spans = append(s.vol.Spans, ids)
	}
	ops = append(ops, meta.Put(meta.VolumeKey(s.vol.ID), meta.EncodeVolume(s.vol), 0), meta.Put(meta.NameKey("vol"), []byte(s.vol.ID.String()), 0))
	if _, err := s.store.Txn(t.Context(), meta.Txn{Then: ops}); err != nil {
		t.Fatal(err)
	}
	s.client = s.newClient("gw", "folder")
	return s
}

// newClient is another process, on the same loop for simplicity.
func (s *scripted) newClient(id, folder string) *Client {
	c := New(Config{Loop: s.loop, Store: s.store, Network: (*scriptedNetwork)(s), Cluster: testCluster,
		Gateway: meta.GatewayMeta{ID: id, Incarnation: s.Rand().Uint64(), Addr: "addr of " + id, Boot: "boot", Folder: folder}})
	s.loop.Post(func() { c.Start(s.t.Context()) })
	return c
}

func (s *scripted) until(what string, cond func() bool) {
	s.t.Helper()
	if !s.RunUntil(time.Minute, cond) {
		s.t.Fatalf("%s: did not happen", what)
	}
}

func (s *scripted) attach() *Attachment {
	s.t.Helper()
	a, err := s.tryAttach(s.client)
	if err != nil {
		s.t.Fatalf("attach: %v", err)
	}
	return a
}

func (s *scripted) tryAttach(c *Client) (a *Attachment, err error) {
	s.t.Helper()
	ended := false
	s.loop.Post(func() {
		c.StartAttach(s.t.Context(), s.vol.ID, func(got *Attachment, e error) { a, err, ended = got, e, true })
	})
	s.until("attach", func() bool { return ended })
	return a, err
}

// outcome waits for an operation.
type outcome struct {
	ended bool
	err   error
}

func (o *outcome) done(err error) {
	if o.ended {
		panic("answered twice")
	}
	o.ended, o.err = true, err
}

func blockOf(v byte) (*payload.Buf, []uint32) {
	p := payload.Copy(bytes.Repeat([]byte{v}, block.Size))
	return p, block.AppendCRCs(nil, p.Bytes())
}

// write starts a write of one block; run the world for its outcome.
func (s *scripted) write(a *Attachment, c block.Chunk, at block.Index, v byte) *outcome {
	o := &outcome{}
	s.loop.Post(func() {
		p, crcs := blockOf(v)
		a.Write(c, at, p, crcs, o.done)
	})
	return o
}

func (s *scripted) volumeNow() meta.VolumeMeta {
	v, err := meta.GetVolume(s.t.Context(), s.store, s.vol.ID)
	if err != nil {
		s.t.Fatal(err)
	}
	return v
}

// contentOps are the content commands that reached nodes, in order.
func (s *scripted) contentOps() (out []asked) {
	for _, a := range s.log {
		if a.req.Kind == wire.ReqPropose && a.req.Command.OpSeq != 0 {
			out = append(out, a)
		}
	}
	return out
}

// receive is a request at a node.
func (s *scripted) receive(a asked) {
	s.log = append(s.log, a)
	if s.silent[a.node] || s.script != nil && s.script(a) {
		return
	}
	s.peace(a)
}

// peace answers as a healthy cluster.
func (s *scripted) peace(a asked) {
	g := s.groups[a.req.Group]
	if g.leader != a.node && (a.req.Kind == wire.ReqPropose || a.req.LeaderOnly) {
		a.reply(wire.Response{Status: wire.StatusNotLeader, Leader: g.leader})
		return
	}
	r := wire.Response{Status: wire.StatusOK, Leader: g.leader}
	switch a.req.Kind {
	case wire.ReqPropose:
		g.index++
		r.Result = g.apply(&a.req.Command)
		r.Applied = block.MakeVersion(0, g.index)
		a.reply(r)
	case wire.ReqRead:
		r.Applied = block.MakeVersion(0, g.index)
		r.Runs = []wire.Run{{Chunk: a.req.Chunk, Block: a.req.Block, Count: a.req.Count, State: block.Hole}}
		a.reply(r)
	case wire.ReqMap:
		r.Applied, r.Covered = block.MakeVersion(0, g.index), a.req.ToChunk
		a.reply(r)
	}
}

func (g *scriptedGroup) apply(c *wire.Command) wire.ApplyResult {
	res := wire.ApplyResult{Outcome: wire.OutcomeApplied, Version: block.MakeVersion(0, g.index)}
	rec := &g.record
	switch {
	case c.Type == wire.CmdDelete:
		rec.Tombstone = true
	case c.Type == wire.CmdFence:
		if g.known && (c.Epoch < rec.Epoch || c.Epoch == rec.Epoch && c.Nonce != rec.Nonce) {
			res.Outcome = wire.OutcomeOldEpoch
			break
		}
		g.known = true
		rec.Volume, rec.Epoch, rec.Nonce = c.Volume, c.Epoch, c.Nonce
		if c.Settings > rec.Settings {
			rec.Size, rec.Settings, rec.ReadOnly = c.Size, c.Settings, c.Flags&wire.FlagReadOnlyVolume != 0
		}
	case c.Epoch != rec.Epoch || c.Nonce != rec.Nonce:
		res.Outcome = wire.OutcomeOldEpoch
		return res
	default:
		return res
	}
	res.Record = *rec
	return res
}

// scriptedNetwork is transport.Network over scripted.
type scriptedNetwork scripted

type scriptedPeer struct {
	s    *scripted
	node block.NodeID
	h    transport.Handler
}

// Dial implements transport.Network.
func (n *scriptedNetwork) Dial(_ context.Context, addr string, h transport.Handler) transport.Peer {
	p := &scriptedPeer{s: (*scripted)(n), node: block.NodeID(addr[0] - '0'), h: h}
	p.s.peers = append(p.s.peers, p)
	return p
}

// Listen implements transport.Network.
func (n *scriptedNetwork) Listen(context.Context, string, transport.Handler) (string, func(), error) {
	panic("a gateway does not listen")
}

// Send implements transport.Peer.
func (p *scriptedPeer) Send(_ transport.Class, m transport.Message) bool {
	a := asked{node: p.node}
	if err := wire.DecodeRequest(m.Header, &a.req); err != nil {
		p.s.t.Errorf("request does not decode: %v", err)
	}
	if a.req.Kind == wire.ReqPropose {
		a.bytes = wire.AppendCommand(nil, &a.req.Command)
	}
	for _, b := range m.Payloads {
		a.data = append(a.data, b.Bytes()...)
	}
	m.Release()
	a.reply = func(r wire.Response, bufs ...*payload.Buf) {
		r.ID, r.Group = a.req.ID, a.req.Group
		m := transport.Message{Type: transport.TypeResponse, Header: wire.AppendResponse(nil, &r), Payloads: bufs}
		p.s.after(200*time.Microsecond, func() { p.h.Receive(p, m) })
	}
	p.s.after(200*time.Microsecond, func() { p.s.receive(a) })
	return true
}

func (s *scripted) after(d time.Duration, f func()) {
	s.loop.Post(func() { s.loop.After(d, f) })
}

// cut breaks the connections to a node.
func (s *scripted) cut(node block.NodeID) {
	for _, p := range s.peers {
		if p.node == node {
			s.loop.Post(func() { p.h.Closed(p, context.Canceled) })
		}
	}
}

// QueuedBytes implements transport.Peer.
func (p *scriptedPeer) QueuedBytes() int { return 0 }

// Addr implements transport.Peer.
func (p *scriptedPeer) Addr() string { return "scripted" }

// Close implements transport.Peer.
func (p *scriptedPeer) Close() {}
