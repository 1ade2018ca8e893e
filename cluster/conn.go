package cluster

import (
	"context"
	"time"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/payload"
)

// conn is the connection to one node.
type conn struct {
	node  block.NodeID
	addr  string
	peer  transport.Peer
	heard clock.Instant // of the newest answer
	// suspect: others are asked first until then, for it was silent or slow.
	suspect clock.Instant
	// away: it was lost, the log says so, and it has not answered since.
	away bool
}

// lost tells the log, once until the node answers again.
func (c *Client) lost(cn *conn, why string) {
	if cn.away || c.session == nil || c.ctx.Err() != nil {
		return
	}
	cn.away = true
	c.log.Warn("node is lost: "+why+"; its groups go on with their other replicas, if those are a majority", "node", cn.node, "addr", cn.addr)
}

// suspectFor is how long a node that was silent or slow is passed by.
const suspectFor = time.Second

// suspected tells whether others should be asked first.
func (c *Client) suspected(id block.NodeID) bool {
	cn := c.conns[id]
	return cn != nil && cn.suspect > c.loop.Now()
}

// call is one request on its way on one connection. It ends once: with an
// answer, or lost, when whether it took effect is unknown.
type call struct {
	id         uint64 // 0 while it is not under way
	conn       *conn
	node       block.NodeID // of conn; stays when the call has ended
	sent       clock.Instant
	slow       time.Duration   // ends the wait in any case
	ctx        context.Context // so does its end; nil: none
	prev, next *call
	// ended gets the response, which is the client's again when it returns, and
	// the holds of bufs; nil when the call was lost.
	ended func(resp *wire.Response, bufs []*payload.Buf)
}

// connTo returns the connection to a node; nil if its address is not known.
func (c *Client) connTo(id block.NodeID) *conn {
	if cn := c.conns[id]; cn != nil {
		return cn
	}
	kv := c.nodes.Get(meta.NodeKey(id))
	if !kv.Exists() {
		return nil
	}
	n, err := meta.DecodeNode(kv)
	if err != nil || n.Addr == "" {
		return nil
	}
	cn := &conn{node: id, addr: n.Addr}
	cn.peer = c.cfg.Network.Dial(c.ctx, n.Addr, (*receiver)(c))
	c.conns[id] = cn
	return cn
}

// nodeChanged drops the connection to an address that is not the node's any more.
func (c *Client) nodeChanged(kv meta.KV) {
	id, err := meta.ParseNodeKey(kv.Key)
	if err != nil || !kv.Exists() {
		return
	}
	n, err := meta.DecodeNode(kv)
	if cn := c.conns[id]; err == nil && cn != nil && cn.addr != n.Addr {
		delete(c.conns, id)
		cn.peer.Close()
		c.loseCalls(cn)
	}
}

// start sends a request whose id it draws. False: nothing was sent; m.Header was
// not made.
func (c *Client) start(cl *call, cn *conn, q *wire.Request, p *payload.Buf) bool {
	c.lastID++
	q.ID = c.lastID
	m := transport.Message{Type: transport.TypeRequest, Header: wire.AppendRequest(make([]byte, 0, 192), q)}
	if p != nil {
		m.Payloads = []*payload.Buf{p.Retain()}
	}
	if !cn.peer.Send(transport.Data, m) {
		return false
	}
	cl.id, cl.conn, cl.node, cl.sent = q.ID, cn, cn.node, c.loop.Now()
	c.calls[cl.id] = cl
	cl.prev, cl.next = c.last, nil
	if c.last != nil {
		c.last.next = cl
	} else {
		c.first = cl
	}
	c.last = cl
	c.armTick()
	return true
}

// forget ends a call without telling; its answer, if it comes, goes nowhere.
func (c *Client) forget(cl *call) {
	if cl.id == 0 {
		return
	}
	delete(c.calls, cl.id)
	if cl.prev != nil {
		cl.prev.next = cl.next
	} else {
		c.first = cl.next
	}
	if cl.next != nil {
		cl.next.prev = cl.prev
	} else {
		c.last = cl.prev
	}
	cl.id, cl.conn, cl.prev, cl.next = 0, nil, nil, nil
}

func (c *Client) lose(cl *call) {
	c.counters.Lost++
	cl.conn.suspect = c.loop.Now().Add(suspectFor)
	c.forget(cl)
	cl.ended(nil, nil)
}

// loseCalls ends all calls on a connection that is gone.
func (c *Client) loseCalls(cn *conn) {
	var gone []*call
	for cl := c.first; cl != nil; cl = cl.next {
		if cl.conn == cn {
			gone = append(gone, cl)
		}
	}
	for _, cl := range gone {
		if cl.conn == cn {
			c.lose(cl)
		}
	}
}

// expireCalls ends the calls that have waited for too long, and those whose
// caller has given up, which is not the node's fault.
func (c *Client) expireCalls() {
	now := c.loop.Now()
	var late, unwanted []*call
	for cl := c.first; cl != nil; cl = cl.next {
		switch {
		case cl.ctx != nil && cl.ctx.Err() != nil:
			unwanted = append(unwanted, cl)
		case now.Sub(max(cl.sent, cl.conn.heard)) > silentCommand, now.Sub(cl.sent) > cl.slow:
			late = append(late, cl)
		}
	}
	for _, cl := range unwanted {
		if cl.id != 0 {
			c.forget(cl)
			cl.ended(nil, nil)
		}
	}
	for _, cl := range late {
		if cl.id != 0 {
			if now.Sub(max(cl.sent, cl.conn.heard)) > silentCommand {
				c.lost(cl.conn, "it does not answer")
			}
			c.lose(cl)
		}
	}
}

// receiver is the Client as its connections see it.
type receiver Client

// Receive implements transport.Handler.
func (r *receiver) Receive(p transport.Peer, m transport.Message) {
	c := (*Client)(r)
	if m.Type != transport.TypeResponse || wire.DecodeResponse(m.Header, &c.resp) != nil {
		if m.Type == transport.TypeResponse || len(m.Payloads) > 0 {
			c.counters.Stray++
		}
		m.Release()
		return
	}
	cl := c.calls[c.resp.ID]
	if cl == nil || cl.conn.peer != p {
		c.counters.Stray++
		m.Release()
		return
	}
	cl.conn.heard, cl.conn.suspect = c.loop.Now(), 0
	if cl.conn.away {
		cl.conn.away = false
		c.log.Info("node answers again", "node", cl.conn.node, "addr", cl.conn.addr)
	}
	c.forget(cl)
	cl.ended(&c.resp, m.Payloads)
}

// Closed implements transport.Handler.
func (r *receiver) Closed(p transport.Peer, _ error) {
	c := (*Client)(r)
	for _, cn := range c.conns {
		if cn.peer == p {
			c.lost(cn, "its connection has ended")
			c.loseCalls(cn)
			return
		}
	}
}

func release(bufs []*payload.Buf) {
	for _, b := range bufs {
		b.Release()
	}
}
