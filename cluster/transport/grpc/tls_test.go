package grpc_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"testing"
	"time"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/transport/grpc"
	"firn.io/firn/cluster/transport/transporttest"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
)

// authority makes certificates that trust one another.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newAuthority(t *testing.T) *authority {
	key, der := certificate(t, &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, nil)
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{cert: cert, key: key, pool: x509.NewCertPool()}
	a.pool.AddCert(cert)
	return a
}

func certificate(t *testing.T, c *x509.Certificate, by *authority) (*ecdsa.PrivateKey, []byte) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c.SerialNumber, c.Subject = big.NewInt(1), pkix.Name{CommonName: "firn test"}
	c.NotBefore, c.NotAfter = time.Unix(0, 0), time.Date(9000, 1, 1, 0, 0, 0, 0, time.UTC)
	parent, signer := c, key
	if by != nil {
		parent, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	return key, der
}

// config is that of one process, for both directions.
func (a *authority) config(t *testing.T) *tls.Config {
	key, der := certificate(t, &x509.Certificate{
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a)
	return &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
		RootCAs:      a.pool, ClientCAs: a.pool, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13,
	}
}

func TestConformanceOverMutualTLS(t *testing.T) {
	a := newAuthority(t)
	conf := a.config(t)
	transporttest.Run(t, &transporttest.Env{
		Network: func(t testing.TB, _ string, id transport.Identity) (transport.Network, func(func())) {
			l := loop.NewSystem(clock.System{}, loop.DefaultLimits)
			t.Cleanup(l.Stop)
			return grpc.New(grpc.Options{Loop: l, Identity: id, ServerTLS: conf, ClientTLS: conf}), func(fn func()) { l.Call(fn) }
		},
		Wait:   transporttest.WaitReal(20 * time.Second),
		Listen: "127.0.0.1:0", Nowhere: "127.0.0.1:1",
	})
}

// watcher notes the end of connections and the messages that came.
type watcher struct {
	heard, lost chan struct{} // capacity 16
}

func newWatcher() watcher {
	return watcher{heard: make(chan struct{}, 16), lost: make(chan struct{}, 16)}
}

func (w watcher) Receive(transport.Peer, transport.Message) { w.heard <- struct{}{} }
func (w watcher) Closed(transport.Peer, error)              { w.lost <- struct{}{} }

func TestStrangersAreNotHeard(t *testing.T) {
	conf := newAuthority(t).config(t)
	stranger := newAuthority(t).config(t)
	stranger.RootCAs = conf.RootCAs // it trusts the server, the server does not trust it
	for name, client := range map[string]*tls.Config{
		"plaintext":         nil,
		"no certificate":    {RootCAs: conf.RootCAs},
		"another authority": stranger,
	} {
		t.Run(name, func(t *testing.T) {
			l := loop.NewSystem(clock.System{}, loop.DefaultLimits)
			defer l.Stop()
			server, cl := newWatcher(), newWatcher()
			addr, stop, err := grpc.New(grpc.Options{Loop: l, ServerTLS: conf}).Listen(t.Context(), "127.0.0.1:0", server)
			if err != nil {
				t.Fatal(err)
			}
			defer stop()
			l.Call(func() {
				p := grpc.New(grpc.Options{Loop: l, ClientTLS: client}).Dial(t.Context(), addr, cl)
				p.Send(transport.Data, transport.Message{Type: transport.TypeRequest, Header: []byte("x")})
			})
			select {
			case <-cl.lost:
			case <-server.heard:
				t.Fatal("the server heard a stranger")
			}
		})
	}
}
