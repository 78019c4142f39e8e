// The sale in Go: gin, redigo, one EVALSHA for each request.
package main

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"log"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/gin-gonic/gin/binding"
	"github.com/go-playground/validator/v10"
	"github.com/gomodule/redigo/redis"
)

const (
	notAfterMs = 2000
	intervalMs = 50
	burst      = 20
	// As many connections to Redis as there are buyers at once.
	poolSize = 256
	// The heap is a few megabytes: by default it would be collected many times a second.
	gcPercent   = 400
	idleTimeout = time.Minute
	stopTimeout = 5 * time.Second
)

var (
	secret         = []byte("order ids of the benchmark")
	errRefused     = errors.New("refused")
	errUnknownSale = errors.New("there is no such sale")
)

type line struct {
	SKU      string `json:"sku" binding:"required,max=64,sku"`
	Quantity int    `json:"quantity" binding:"required,min=1,max=10000"`
}

type wish struct {
	Items     []line `json:"items" binding:"required,min=1,max=20,dive"`
	Amount    int64  `json:"amount" binding:"required,min=1"`
	OrderName string `json:"orderName" binding:"max=100"`
}

type heldLine struct {
	SKU      string `json:"sku"`
	Quantity int    `json:"quantity"`
	Price    int64  `json:"price"`
}

type held struct {
	OrderID   string     `json:"orderId"`
	SaleID    string     `json:"saleId"`
	Status    string     `json:"status"`
	Amount    int64      `json:"amount"`
	CreatedAt int64      `json:"createdAt"`
	ExpiresAt int64      `json:"expiresAt"`
	Items     []heldLine `json:"items"`
}

type shop struct {
	pool   *redis.Pool
	script *redis.Script
	// The epoch of each sale that was read; it changes only after a loss of data.
	epochs sync.Map
}

func (s *shop) prepare(c *gin.Context) {
	body, err := c.GetRawData()
	if err != nil {
		refuse(c, http.StatusBadRequest, "malformed_request")
		return
	}
	var asked wish
	if err := binding.JSON.BindBody(body, &asked); err != nil {
		refuse(c, http.StatusBadRequest, "malformed_request")
		return
	}
	sale := c.Param("sale")
	buyer, key := c.GetHeader("X-Buyer"), c.GetHeader("Idempotency-Key")
	answer := held{
		OrderID: orderID(sale, buyer, key), SaleID: sale, Status: "HELD", Amount: asked.Amount,
	}
	code, err := s.hold(buyer, digest(body), &asked, &answer)
	switch {
	case errors.Is(err, errRefused):
		refuse(c, http.StatusConflict, code)
	case errors.Is(err, errUnknownSale):
		refuse(c, http.StatusNotFound, "sale_not_found")
	case err != nil:
		log.Print(err)
		refuse(c, http.StatusServiceUnavailable, "unavailable")
	default:
		c.JSON(http.StatusCreated, &answer)
	}
}

// hold fills in the answer, or returns errRefused and the code.
func (s *shop) hold(buyer, digest string, asked *wish, answer *held) (string, error) {
	first := asked.Items[0]
	now := time.Now().UnixMilli()
	conn := s.pool.Get()
	defer conn.Close()
	tag := "rsv:{" + answer.SaleID + "}:"
	epoch, err := s.epochOf(conn, answer.SaleID, tag+"sale")
	if err != nil {
		return "", err
	}
	reply, err := redis.Values(s.script.Do(conn,
		tag+"sale", tag+"deadlines", tag+"outbox", tag+"confirming", tag+"deposits",
		tag+"stock:"+first.SKU, tag+"order:"+answer.OrderID, tag+"buyer:"+buyer,
		tag+"buyer-orders:"+buyer, tag+"rate:"+buyer,
		now+notAfterMs, epoch, 0, "", now, intervalMs, burst, 0, 0, 0, 1, 1, 1, "1", 1, "",
		first.SKU, digest, "Hoodie", `"Hoodie"`, asked.Amount, 0,
		"1 "+strconv.Itoa(first.Quantity),
	))
	if err != nil {
		return "", err
	}
	return read(reply, answer)
}

func (s *shop) epochOf(conn redis.Conn, sale, key string) (string, error) {
	if known, ok := s.epochs.Load(sale); ok {
		return known.(string), nil
	}
	epoch, err := redis.String(conn.Do("HGET", key, "epoch"))
	if errors.Is(err, redis.ErrNil) {
		return "", errUnknownSale
	}
	if err == nil {
		s.epochs.Store(sale, epoch)
	}
	return epoch, err
}

// read takes the reply for the one basket: the number of its event, or a refusal.
func read(reply []interface{}, answer *held) (string, error) {
	common, err := redis.Values(reply[0], nil)
	if err != nil {
		return "", err
	}
	if len(reply) < 2 {
		code, err := redis.String(common[0], nil)
		return code, orRefused(err)
	}
	if _, taken := reply[1].(int64); !taken {
		refusal, err := redis.Values(reply[1], nil)
		if err != nil {
			return "", err
		}
		code, err := redis.String(refusal[0], nil)
		return code, orRefused(err)
	}
	var items []byte
	if _, err := redis.Scan(
		common, nil, &answer.ExpiresAt, &answer.CreatedAt, nil, &items,
	); err != nil {
		return "", err
	}
	return "", json.Unmarshal(items, &answer.Items)
}

func orRefused(err error) error {
	if err != nil {
		return err
	}
	return errRefused
}

// UnmarshalJSON takes a line of the script: ["hoodie",1,39000].
func (l *heldLine) UnmarshalJSON(text []byte) error {
	return json.Unmarshal(text, &[]interface{}{&l.SKU, &l.Quantity, &l.Price})
}

func orderID(sale, buyer, key string) string {
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(buyer + ":" + key))
	return sale + "-" + base64.RawURLEncoding.EncodeToString(mac.Sum(nil)[:18])
}

func digest(body []byte) string {
	sum := sha256.Sum256(body)
	return base64.RawURLEncoding.EncodeToString(sum[:9])
}

func refuse(c *gin.Context, status int, code string) {
	c.JSON(status, gin.H{"code": code})
}

// isSKU is the pattern [A-Za-z0-9_.-]+.
func isSKU(field validator.FieldLevel) bool {
	for _, r := range field.Field().String() {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
		case r == '_' || r == '.' || r == '-':
		default:
			return false
		}
	}
	return true
}

func engine(s *shop) *gin.Engine {
	gin.SetMode(gin.ReleaseMode)
	binding.EnableDecoderDisallowUnknownFields = true
	if rules, ok := binding.Validator.Engine().(*validator.Validate); ok {
		if err := rules.RegisterValidation("sku", isSKU); err != nil {
			log.Fatal(err)
		}
	}
	router := gin.New()
	router.Use(gin.Recovery())
	router.POST("/v1/sales/:sale/reservations", s.prepare)
	return router
}

func main() {
	debug.SetGCPercent(gcPercent)
	source, err := os.ReadFile(os.Getenv("BENCH_SCRIPT"))
	if err != nil {
		log.Fatal(err)
	}
	socket := os.Getenv("BENCH_SOCKET")
	pool := &redis.Pool{
		MaxIdle:     poolSize,
		MaxActive:   poolSize,
		Wait:        true,
		IdleTimeout: idleTimeout,
		Dial:        func() (redis.Conn, error) { return redis.Dial("unix", socket) },
	}
	shop := &shop{pool: pool, script: redis.NewScript(10, string(source))}
	server := &http.Server{Addr: "127.0.0.1:" + os.Getenv("BENCH_PORT"), Handler: engine(shop)}
	stop, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer cancel()
	go func() {
		<-stop.Done()
		end, cancel := context.WithTimeout(context.Background(), stopTimeout)
		defer cancel()
		_ = server.Shutdown(end)
	}()
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		log.Fatal(err)
	}
}
