package cluster

import (
	"context"
	"time"

	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/payload"
)

// healthTime bounds how long a node is waited for that is asked how it is.
const healthTime = time.Second

// StoreProblem is why the metadata store did not answer when this process last
// told it that it lives, or nil. It is called on the loop.
func (c *Client) StoreProblem() error {
	if c.session != nil && c.session.Failing() {
		return c.session.Problem()
	}
	return nil
}

// NodeHealth asks a node how it is. It is called on the loop, and so is done,
// once. Kind Unavailable when the node is not known, or does not answer within
// a second or the life of ctx; Unsupported when it is too old to tell.
func (c *Client) NodeHealth(ctx context.Context, id block.NodeID, done func(wire.NodeHealth, error)) {
	fail := func(err error) { c.loop.Post(func() { done(wire.NodeHealth{}, err) }) }
	cn := c.connTo(id)
	if cn == nil {
		fail(block.Errorf(block.Unavailable, "node %d is not known", id))
		return
	}
	cl := &call{ctx: ctx, slow: healthTime}
	cl.ended = func(resp *wire.Response, bufs []*payload.Buf) {
		release(bufs)
		switch {
		case resp == nil:
			done(wire.NodeHealth{}, block.Errorf(block.Unavailable, "node %d does not say how it is", id))
		case resp.Status != wire.StatusOK:
			done(wire.NodeHealth{}, block.Errorf(block.Unsupported, "node %d cannot tell how it is: %s", id, resp.Text))
		default:
			done(wire.DecodeHealth(resp.Health))
		}
	}
	if !c.start(cl, cn, &wire.Request{Kind: wire.ReqHealth}, nil) {
		fail(block.Errorf(block.Unavailable, "node %d cannot be asked how it is", id))
	}
}
