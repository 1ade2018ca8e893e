// Package grpc is the transport between processes: frames over two
// bidirectional gRPC streams per peer, one for data and one, on a connection of
// its own, for votes and heartbeats. Payload never passes through protobuf.
//
// Everything here runs on goroutines of its own; the Loop sees only posted
// functions, and gives only queued messages.
package grpc

import (
	"context"
	"crypto/tls"
	"math/rand/v2"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
)

// Windows and buffers. Static: the estimator would cost a ping per read.
const (
	streamWindow = 8 << 20
	connWindow   = 16 << 20
	bufferBytes  = 256 << 10
)

// Times of a connection.
const (
	dialTimeout      = 2 * time.Second
	minBackoff       = 50 * time.Millisecond
	maxBackoff       = time.Second
	keepaliveAfter   = 10 * time.Second
	keepaliveTimeout = 3 * time.Second
	// helloTime bounds what comes before the first frame of a stream, for a
	// client that is not one of ours, or is stuck.
	helloTime = 5 * time.Second
)

// Limits of a listener.
const (
	// maxStreams of a connection: our own has one, beside calls of other services.
	maxStreams = 64
	// maxSessions is above the nodes and gateways of the largest cluster.
	maxSessions = 4096
)

// Options of a Network.
type Options struct {
	Loop     loop.Loop
	Identity transport.Identity
	// ServerTLS and ClientTLS, if set, secure both directions; for mutual
	// authentication the server's config asks for client certificates. Nil is
	// plaintext.
	ServerTLS, ClientTLS *tls.Config
	// Register, if set, adds other services to a server before it serves.
	Register func(*grpc.Server)
}

// Network implements transport.Network.
type Network struct {
	opts      Options
	helloTime time.Duration // helloTime, but in tests
}

// New returns a network. It opens nothing until it dials or listens.
func New(o Options) *Network { return &Network{opts: o, helloTime: helloTime} }

// The streams of the service, by class.
var streams = [2]grpc.StreamDesc{
	transport.Control: {StreamName: "Control", ServerStreams: true, ClientStreams: true},
	transport.Data:    {StreamName: "Data", ServerStreams: true, ClientStreams: true},
}

const serviceName = "firn.Transport"

func method(c transport.Class) string { return "/" + serviceName + "/" + streams[c].StreamName }

// sessionKey is the metadata key that ties the two streams of a peer together.
const sessionKey = "firn-session"

// Listen implements transport.Network. stop waits for the streams, not for the
// loop: it may be called on it.
func (n *Network) Listen(ctx context.Context, addr string, h transport.Handler) (string, func(), error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return "", nil, block.Wrap(block.Unavailable, err, "listen on %s", addr)
	}
	creds := insecure.NewCredentials()
	if n.opts.ServerTLS != nil {
		creds = credentials.NewTLS(n.opts.ServerTLS)
	}
	s := grpc.NewServer(
		grpc.Creds(creds),
		grpc.StaticStreamWindowSize(streamWindow), grpc.StaticConnWindowSize(connWindow),
		grpc.ReadBufferSize(bufferBytes), grpc.WriteBufferSize(bufferBytes),
		grpc.MaxRecvMsgSize(maxFrameBytes), grpc.MaxSendMsgSize(maxFrameBytes),
		grpc.WaitForHandlers(true), grpc.MaxConcurrentStreams(maxStreams), grpc.ConnectionTimeout(helloTime),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveAfter, Timeout: keepaliveTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: keepaliveAfter / 2, PermitWithoutStream: true}),
	)
	srv := &server{net: n, h: h, sessions: make(map[string]*session)}
	desc := grpc.ServiceDesc{ServiceName: serviceName, HandlerType: (*any)(nil)}
	for c := range streams {
		sd := streams[c]
		sd.Handler = func(_ any, st grpc.ServerStream) error { return srv.serve(transport.Class(c), st) }
		desc.Streams = append(desc.Streams, sd)
	}
	s.RegisterService(&desc, srv)
	if n.opts.Register != nil {
		n.opts.Register(s)
	}
	served := make(chan struct{}) // closed when the listener's goroutine has ended
	go func() {
		defer close(served)
		// Serve returns when Stop is called; there is nobody to tell of more.
		_ = s.Serve(l)
	}()
	return l.Addr().String(), func() { srv.stop(); s.Stop(); <-served }, nil
}

// Dial implements transport.Network.
func (n *Network) Dial(ctx context.Context, addr string, h transport.Handler) transport.Peer {
	return &peer{net: n, h: h, addr: addr, ctx: ctx, dialled: true}
}

// connect opens a gRPC connection and on it the stream of class c.
func (n *Network) connect(ctx context.Context, addr, id string, c transport.Class) (*grpc.ClientConn, grpc.ClientStream, error) {
	creds := insecure.NewCredentials()
	if n.opts.ClientTLS != nil {
		creds = credentials.NewTLS(n.opts.ClientTLS)
	}
	cc, err := grpc.NewClient("passthrough:///"+addr,
		grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			d := net.Dialer{Timeout: dialTimeout}
			return d.DialContext(ctx, "tcp", addr)
		}),
		grpc.WithStaticStreamWindowSize(streamWindow), grpc.WithStaticConnWindowSize(connWindow),
		grpc.WithReadBufferSize(bufferBytes), grpc.WithWriteBufferSize(bufferBytes),
		grpc.WithDisableServiceConfig(), grpc.WithNoProxy(),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveAfter, Timeout: keepaliveTimeout}),
		grpc.WithDefaultCallOptions(
			grpc.CallContentSubtype(codecName),
			grpc.MaxCallRecvMsgSize(maxFrameBytes), grpc.MaxCallSendMsgSize(maxFrameBytes)),
	)
	if err != nil {
		return nil, nil, err
	}
	st, err := cc.NewStream(metadata.AppendToOutgoingContext(ctx, sessionKey, id), &streams[c], method(c))
	if err != nil {
		cc.Close()
		return nil, nil, err
	}
	return cc, st, nil
}

// jitter spreads the reconnects of many peers.
func jitter(d time.Duration, r *rand.Rand) time.Duration {
	return d/2 + time.Duration(r.Int64N(int64(d)))
}
