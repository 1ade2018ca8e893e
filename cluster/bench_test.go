package cluster

import (
	"context"
	"testing"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/payload"
)

// instantNetwork answers every request in the next turn: what is measured is the
// client alone, with the encoding of requests and the decoding of answers.
type instantNetwork struct {
	scriptedNetwork
	loop  loop.Loop
	index uint64
}

type instantPeer struct {
	scriptedPeer
	n *instantNetwork
	h transport.Handler
}

func (n *instantNetwork) Dial(_ context.Context, _ string, h transport.Handler) transport.Peer {
	return &instantPeer{n: n, h: h}
}

func (p *instantPeer) Send(_ transport.Class, m transport.Message) bool {
	var q wire.Request
	if err := wire.DecodeRequest(m.Header, &q); err != nil {
		panic(err)
	}
	m.Release()
	p.n.index++
	at := block.MakeVersion(0, p.n.index)
	r := wire.Response{ID: q.ID, Group: q.Group, Status: wire.StatusOK, Applied: at, Result: wire.ApplyResult{Outcome: wire.OutcomeApplied, Version: at}}
	out := transport.Message{Type: transport.TypeResponse}
	if q.Kind == wire.ReqRead {
		b := payload.New(int(q.Count) * block.Size)
		r.Result = wire.ApplyResult{}
		r.Runs, r.CRCs = []wire.Run{{Chunk: q.Chunk, Block: q.Block, Count: q.Count}}, block.AppendCRCs(nil, b.Bytes())
		out.Payloads = []*payload.Buf{b}
	}
	out.Header = wire.AppendResponse(nil, &r)
	p.n.loop.Post(func() { p.h.Receive(p, out) })
	return true
}

func BenchmarkAttachment(b *testing.B) {
	for _, kind := range []string{"write", "read"} {
		b.Run(kind+"4K", func(b *testing.B) { benchAttachment(b, kind == "write") })
	}
}

func benchAttachment(b *testing.B, write bool) {
	l := loop.NewSystem(clock.System{}, loop.DefaultLimits)
	b.Cleanup(l.Stop)
	store := meta.NewMem(clock.System{}).Client()
	v := meta.VolumeMeta{ID: block.VolumeID{7}, Name: "vol", SizeBytes: 1 << 30, BlockSize: 512, Replicas: 1, State: meta.Ready, Spans: [][]block.GroupID{{1, 2}}}
	c := New(Config{Loop: l, Store: store, Network: &instantNetwork{loop: l}, Cluster: testCluster, Gateway: meta.GatewayMeta{ID: "gw"}})
	var a *Attachment
	l.Call(func() {
		c.ctx, c.cancel = context.WithCancel(b.Context())
		c.nodes.Start(c.ctx)
		a = newAttachment(c, v, meta.OwnerMeta{Epoch: 1, Nonce: 1}, 0)
		for _, s := range a.streams {
			s.group.replicas, s.group.leader = []block.NodeID{1}, 1
		}
		c.conns[1] = &conn{node: 1, peer: c.cfg.Network.Dial(c.ctx, "", (*receiver)(c))}
	})
	p, crcs := blockOf(1)
	const depth = 32
	b.ReportAllocs()
	b.ResetTimer()
	ended := make(chan struct{})
	l.Post(func() {
		left, flying := b.N, 0
		var one func()
		next := func(err error) {
			if err != nil {
				b.Error(err)
			}
			flying--
			one()
		}
		read := func(pieces []payload.Piece, err error) {
			for _, p := range pieces {
				p.Buf.Release()
			}
			next(err)
		}
		one = func() {
			if left == 0 {
				if flying == 0 {
					close(ended)
				}
				return
			}
			left--
			flying++
			if write {
				a.Write(block.Chunk(left%200), block.Index(left%1000), p.Retain(), crcs, next)
			} else {
				a.Read(context.Background(), block.Chunk(left%200), block.Index(left%1000), 1, read)
			}
		}
		for range min(depth, b.N) {
			one()
		}
	})
	<-ended
}
